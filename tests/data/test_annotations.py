"""Members of records that are passed over while parsing."""

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_dist.data.formats.annotations import AnnotationFile

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
)
NAMES = st.sampled_from(["segmentation", "bbox", "item", ""])
VALUES = st.recursive(
    SCALARS | st.text(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3)
)


def stripped(value: Any) -> Any:
    if isinstance(value, list):
        return [stripped(each) for each in value]
    if isinstance(value, dict):
        return {name: stripped(each) for name, each in value.items() if name != "segmentation"}
    return value


@settings(max_examples=200, deadline=None)
@given(before=VALUES, records=st.lists(VALUES, max_size=5))
def test_members_are_passed_over_and_the_rest_stays(
    before: Any, records: list[Any], tmp_path_factory: Any
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "passed-over.json"
    path.write_text(json.dumps({"segmentation": before, "other": before, "annotations": records}))
    file = AnnotationFile(path, "--instances", "a file")
    found = [record.value for record in file.items("annotations.item", without="segmentation")]
    assert found == [stripped(each) for each in records]
