#!/bin/sh
# Diffs and merges of notebooks by nbdime from .venv, or by git itself where nbdime is missing.
#   setup   make this clone use the two others (local configuration; .gitattributes names them)
#   diff    git's external diff driver
#   merge   git's merge driver: %O %A %B %L %P
set -eu
python=.venv/bin/python # git calls a driver in the top folder of the work tree

have_nbdime() { "$python" -c "import nbdime" 2>/dev/null; }

case ${1:-} in
setup)
    # Only in a clone of this very folder: not in an unpacked archive, nor in one that lies in another repository.
    top=$(git rev-parse --show-cdup 2>/dev/null) || exit 0
    if [ -n "$top" ]; then exit 0; fi
    git config --local diff.jupyternotebook.command "sh tools/notebook_git.sh diff"
    git config --local merge.jupyternotebook.name "notebooks by cells"
    git config --local merge.jupyternotebook.driver "sh tools/notebook_git.sh merge %O %A %B %L %P"
    ;;
diff)
    shift
    if have_nbdime; then exec "$python" -m nbdime.vcs.git.diffdriver diff "$@"; fi
    # arguments: path old-file old-hex old-mode new-file new-hex new-mode; git diff says 1 for "they differ"
    git --no-pager diff --no-index --no-ext-diff -- "$2" "$5" || [ $? -eq 1 ]
    ;;
merge)
    shift
    if have_nbdime; then exec "$python" -m nbdime.vcs.git.mergedriver merge "$@"; fi
    exec git merge-file --marker-size="$4" -L ours -L base -L theirs "$2" "$1" "$3"
    ;;
*)
    echo "usage: sh tools/notebook_git.sh setup | diff ... | merge %O %A %B %L %P" >&2
    exit 2
    ;;
esac
