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
  echo "$wanted" >"$stamp"
fi
PATH="$(cd "$venv" && pwd)/bin:$PATH"
export PATH
