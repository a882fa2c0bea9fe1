#!/bin/sh
# Make .venv ready, or do nothing when it is. Safe to repeat, also after an interrupted run.
#   PYTHON       the Python that makes it (python3)
#   TORCH_INDEX  a package index to take torch and torchvision from, for example one without CUDA
#   VENV, CONSTRAINTS, EXTRAS   another environment (see `make test-lowest`)
#   PACKAGES     these alone, without the project (see `make audit`)
#   UPGRADE      if it is set: the newest of everything, looked for each time (see `make test-newest`)
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-constraints.txt}
extras=${EXTRAS:-book,test}
python=${PYTHON:-python3}
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# What the installation depends on. The [tool.…] tables at the end of pyproject.toml are not part of it.
key=$({ pwd; echo "$extras" "${PACKAGES:-}"; sed '/^\[tool\./,$d' pyproject.toml; cat "$constraints"; } | cksum)

if [ -z "${UPGRADE:-}" ] && [ "$(cat "$venv/.installed" 2>/dev/null)" = "$key" ] && "$venv/bin/python" -c "" 2>/dev/null; then
    exit 0
fi

say() { printf '%s\n' "$@" >&2; }
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

# A .venv that an interrupted run or a removed Python left unusable is made anew.
if ! "$venv/bin/python" -c "$new_enough" 2>/dev/null || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if ! command -v "$python" >/dev/null 2>&1; then
        say "There is no '$python' here. This project needs Python 3.11 or newer." \
            "Debian, Ubuntu: apt-get install python3 python3-venv" \
            "macOS: brew install python" \
            "If it has another name: make PYTHON=/path/to/python3 ..."
        exit 1
    fi
    if ! "$python" -c "$new_enough"; then
        version=$("$python" -c 'import sys; print("%d.%d.%d" % tuple(sys.version_info[:3]))')
        say "'$python' is Python $version. This project needs Python 3.11 or newer."
        for other in python3.14 python3.13 python3.12 python3.11; do
            if "$other" -c "$new_enough" 2>/dev/null; then
                say "There is a newer one here: make PYTHON=$other ..."
                exit 1
            fi
        done
        say "Install one beside it and name it: make PYTHON=python3.12 ..."
        exit 1
    fi
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % tuple(sys.version_info[:2]))')
        say "'$python' (Python $version) cannot make virtual environments: its modules venv and ensurepip are missing." \
            "Debian, Ubuntu: apt-get install python$version-venv (or python3-venv)" \
            "Elsewhere install Python from python.org or with your package manager and name it: make PYTHON=... ..."
        exit 1
    fi
    say "making $venv with $python"
    "$python" -m venv --clear "$venv"
fi

rm -f "$venv/.installed"
# A package without its list of files was interrupted while being installed: let pip install it once more.
for package in "$venv"/lib/python*/site-packages/*.dist-info; do
    if [ -d "$package" ] && [ ! -f "$package/RECORD" ]; then rm -rf "$package"; fi
done

if [ -z "${PACKAGES:-}" ]; then size="the first time several GB, most of it torch"; else size=$PACKAGES; fi
say "installing into $venv ($size)"
if [ -t 1 ]; then quiet=; else quiet=--quiet; fi
upgrade=${UPGRADE:+--upgrade --upgrade-strategy eager}
"$venv/bin/python" -m pip install --quiet --upgrade pip setuptools
if [ -n "${PACKAGES:-}" ]; then
    "$venv/bin/python" -m pip install $quiet $PACKAGES
    printf '%s\n' "$key" >"$venv/.installed"
    exit 0
fi
if [ -n "${TORCH_INDEX:-}" ]; then
    # Without dependencies: these come from the usual index with everything else.
    "$venv/bin/python" -m pip install $quiet $upgrade --no-deps --index-url "$TORCH_INDEX" -c "$constraints" \
        torch torchvision
fi
"$venv/bin/python" -m pip install $quiet $upgrade -c "$constraints" -e ".[$extras]"
"$venv/bin/python" -c "import diffbook, torch"

if [ "$venv" = .venv ]; then sh tools/notebook_git.sh setup; fi
printf '%s\n' "$key" >"$venv/.installed"
