from pathlib import Path
import pytest
@pytest.fixture(scope="session")
def scenes_base(tmp_path_factory):
    from qwenvl_dist.synthetic.base import write_random_base
    p=tmp_path_factory.mktemp("b")/"base"; write_random_base(p,"scenes"); return p
def _pack(folder,n,seed):
    from qwenvl_dist.synthetic.scenes import write_scenes
    from qwenvl_dist.data.formats import read_coco_captions
    from qwenvl_dist.data.pack import pack
    c=write_scenes(folder/"s",n,seed)["train"]
    pack(read_coco_captions(c,c.parent/"images"),folder/"shards",samples_per_shard=9)
    return folder/"shards"
@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory): return _pack(tmp_path_factory.mktemp("t"),40,0)
@pytest.fixture(scope="session")
def scene_validation_shards(tmp_path_factory): return _pack(tmp_path_factory.mktemp("v"),12,1)
