# Sourced by the scripts beside it, from the repository's root: make .venv once, and put it first on PATH.
# Nothing is installed again until pyproject.toml or the constraints change.
venv="${QWENVL_VENV:-.venv}"
stamp="$venv/.installed"
wanted="$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "set-up: installing into $venv" >&2
  "${PYTHON:-python3}" -m venv "$venv"
  # torch and torchvision first and together: a later resolve must not pull another build of one of them.
  "$venv/bin/python" -m pip install --quiet --constraint launch/constraints.txt torch torchvision
  "$venv/bin/python" -m pip install --quiet --constraint launch/constraints.txt --editable ".[dev]"
fi
PATH="$(cd "$venv" && pwd)/bin:$PATH"
# What torch compiles belongs to this environment: two environments that share a folder rebuild each other's.
export PATH TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$(cd "$venv" && pwd)/torch_extensions}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  # Without a GPU DeepSpeed compiles its shared-memory collective at the first start: once, here, not in every rank at once.
  python - <<'PY' >&2 || echo "set-up: DeepSpeed's CPU collective was not compiled now; the first run will do it" >&2
import os, torch
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    ShareMemCommBuilder().load(verbose=False)
PY
  echo "$wanted" >"$stamp"
fi
