#!/bin/sh
# Makes .venv, where everything of this working copy is installed: venv.sh PYTHON
#
# A fresh machine may lack parts of Python that its distribution packs apart; where that can
# be mended (Debian's packages, as root), it is, and else the message says what to do.
set -eu

python=$1

main() {
    is_complete && exit 0
    require_compiler
    require_version
    has_parts || install_parts
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
    # The pip that comes with Python may be too old for dependency groups.
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
}

is_complete() {
    .venv/bin/python -c 'import pip; assert tuple(map(int, pip.__version__.split(".")[:2])) >= (25, 1)' \
        2>/dev/null
}

require_compiler() {
    command -v gcc >/dev/null || fail "gcc is missing: install it (Debian: apt-get install gcc libc6-dev)"
}

require_version() {
    command -v "$python" >/dev/null || fail "$python is missing: install Python 3.11 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail \
        "$("$python" --version) is too old: jobworker needs 3.11 or newer; name one with make PYTHON=..."
}

# ensurepip, to make the environment; Python.h, to build the extension.
has_parts() {
    "$python" - 2>/dev/null <<'END'
import ensurepip, os, sysconfig, venv
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
END
}

install_parts() {
    remedy="install the parts of $python that make environments and build extensions
  (Debian: apt-get install python3-venv python3-dev)"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "venv or Python.h is missing: $remedy"
    fi
    echo "Installing python3-venv and python3-dev, which $python lacks"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq --yes --no-install-recommends python3-venv python3-dev >/dev/null; } ||
        fail "apt-get did not install them: $remedy"
    has_parts || fail "$python still lacks venv or Python.h: $remedy, or use another: make PYTHON=..."
}

fail() {
    echo "$1" >&2
    exit 1
}

main
