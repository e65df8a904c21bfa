#!/usr/bin/env bash
# Set up a Debian-like machine that has git and apt: Python, a virtual environment in .venv, and the packages.
#
#   bash deploy/setup.sh        what `make demo` needs
#   bash deploy/setup.sh serve  also what `make serve` needs
#   bash deploy/setup.sh dev    also what `make test` and `make lint` need (docs, release: for those targets)
#
# The script can be run repeatedly: it returns at once if the set-up is complete, and repeats an interrupted one.
# PYTHON=/path/to/python and TORCH='torch==2.14.1' select another interpreter and another version of torch.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-base} in
    base) extras='' ;;
    serve) extras='[serve]' ;;
    dev) extras='[dev]' ;;
    docs) extras='[docs]' ;;
    release) extras='[release]' ;;
    *) echo "setup.sh: unknown set-up '$1'; choose base, serve, dev, docs or release" >&2 && exit 2 ;;
esac
# Without a GPU, 2.13.0, so that pip can use a local CPU build (PIP_FIND_LINKS); with a GPU, the version that pip chooses.
if command -v nvidia-smi >/dev/null; then torch='torch>=2.11'; else torch='torch==2.13.0'; fi
torch=${TORCH:-$torch}
made_for="$PWD $torch ${PYTHON:-}"
stamp=".venv/${1:-base}.stamp"
key=$({ echo "$made_for" && cat pyproject.toml deploy/setup.sh; } | sha256sum)

is() { [[ -f $1 && $(<"$1") == "$2" ]]; } # is FILE TEXT: the file contains exactly this text
is "$stamp" "$key" && [[ -x .venv/bin/python ]] && exit 0

fail() {
    printf '\nset-up: %s\n' "$1" >&2
    exit 1
}

# A link leads to somebody else's environment, which a set-up would empty.
[[ ! -L .venv ]] || fail ".venv is a link to $(readlink .venv). Remove the link, or run the set-up where it leads."

step() { # step LABEL COMMAND...: print one line with the duration, and the command's output only if it fails
    local label=$1 begin=$SECONDS code=0 clock=''
    shift
    printf '  %-42s' "$label"
    if [[ -t 1 ]]; then # in a terminal, the seconds run while the command does, until this script ends
        (while sleep 1 && kill -0 $$; do printf '\r  %-42s%4d s' "$label" $((SECONDS - begin)); done) 2>/dev/null 9<&- &
        clock=$!
    fi
    "$@" >"$log" 2>&1 || code=$?
    if [[ -n $clock ]]; then
        kill "$clock" 2>/dev/null || true
        wait "$clock" 2>/dev/null || true
        printf '\r  %-42s' "$label"
    fi
    if ((code)); then
        printf 'failed (exit %d)\n' "$code"
        grep -v "^WARNING: Location 'file:" "$log" | tail -n 25 | cut -c -300 | sed 's/^/    | /'
        fail "'$label' failed. Fix the cause and run the same command again."
    fi
    printf '%4d s\n' $((SECONDS - begin))
}

works() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() { # 3.11 first: a local CPU wheel of torch is usually built for it
    local name
    for name in ${PYTHON:-python3.11 python3.13 python3.12 python3}; do
        if works "$name"; then python=$name && return 0; fi
    done
    return 1
}

apt_install_python() {
    local root=()
    ((EUID == 0)) || root=(sudo)
    "${root[@]}" apt-get update -qq &&
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            python3 python3-venv
}

want_python() {
    find_python && return
    [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON is not a Python >= 3.11 with the venv module"
    command -v apt-get >/dev/null || fail "there is no Python >= 3.11 with the venv module, and no apt-get to install one"
    ((EUID == 0)) || command -v sudo >/dev/null ||
        fail "there is no Python >= 3.11 with the venv module. Run as root: apt-get install python3 python3-venv"
    step "python3 and python3-venv, with apt-get" apt_install_python
    find_python || fail "this system's python3 is older than 3.11; set PYTHON=/path/to/python to a newer one"
}

pip_install() { .venv/bin/python -m pip install -q --no-input --disable-pip-version-check "$@"; }

new_venv() {
    mkdir -p .venv
    [[ -e .venv/made-by-setup || -z $(ls -A .venv) ]] || fail ".venv was not created by this script; move it elsewhere"
    want_python
    touch .venv/made-by-setup # kept while the rest is removed, so that the next run recognises this .venv if this one is killed
    find .venv/ -mindepth 1 -maxdepth 1 ! -name made-by-setup -exec rm -rf {} +
    step "$("$python" -V), new .venv" "$python" -m venv .venv
    step "$torch" pip_install "$torch"
}

# Only one set-up runs at a time. The lock is on the folder itself; a pip that outlives a killed run keeps it.
exec 9<.
flock -n 9 || { echo "set-up: waiting for another set-up in this checkout" && flock 9; }
is "$stamp" "$key" && exit 0

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# .venv/whole and the stamps exist only while no installation is in progress. If `whole` is missing, or names another
# path, torch or interpreter, .venv may be incomplete or unsuitable, so it is created again. Otherwise the packages are
# updated in place.
echo "set-up (${1:-base}) in $PWD/.venv; the first one downloads torch and more, which takes minutes"
if [[ -x .venv/bin/python ]] && is .venv/whole "$made_for"; then rm -f .venv/whole .venv/*.stamp; else new_venv; fi
step "omnivideo$extras and its dependencies" pip_install -e ".$extras"
echo "$key" >.venv/base.stamp
echo "$key" >"$stamp"
echo "$made_for" >.venv/whole
printf '  %-42s%4d s, %s\n' "done" "$SECONDS" "$(du -sh .venv | cut -f 1)"
