#!/usr/bin/env bash
# Build the sdist and, from it, the wheel; look inside both; run the installed wheel from an empty folder.
#
#     bash tests/wheel.sh PYTHON
#
# PYTHON has verideq's dependencies, pip and `build`. The wheel goes into an environment of its own, which borrows the
# dependencies but not PYTHON's own verideq: a package path added by a .pth file has its own .pth files left unread.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
tar -tzf "$work"/dist/*.tar.gz | sed 's,^[^/]*/,,' | sort >"$work/sdist"
"$python" -m zipfile -l "$work"/dist/*.whl | awk 'NR > 1 { print $1 }' | sort >"$work/wheel"

fail() {
    echo "$1" >&2
    echo "the files it holds:" >&2
    cat "$2" >&2
    exit 1
}
holds() { grep -qE "^$2\$" "$1" || fail "the $(basename "$1") holds no $2" "$1"; }
lacks() { ! grep -E "^$2" "$1" || fail "the $(basename "$1") holds $2, and should not" "$1"; }

for pattern in 'verideq/__init__\.py' 'verideq/py\.typed' 'verideq/models/.*\.safetensors'; do
    holds "$work/wheel" "$pattern"
    holds "$work/sdist" "$pattern"
done
for pattern in LICENSE README.md CHANGELOG.md CITATION.cff CONTRIBUTING.md Makefile \
    'docs/.*\.md' 'recipes/.*\.toml' 'tests/conftest\.py' 'tests/wheel\.sh' 'benchmarks/.*\.py'; do
    holds "$work/sdist" "$pattern"
done
lacks "$work/sdist" '(certify|parametrizations)(/|$)'
lacks "$work/wheel" '(certify|parametrizations|tests|docs|recipes|benchmarks|proofs_checks|examples)(/|$)'
# Every module of the tree is in the wheel, whatever the tool that finds packages thinks of its folder.
find verideq -name '*.py' | sort >"$work/tree"
comm -23 "$work/tree" "$work/wheel" >"$work/missing"
[[ ! -s $work/missing ]] || fail "the wheel lacks modules of the tree" "$work/missing"

"$python" -m venv --without-pip "$work/env"
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
site "$python" >"$(site "$work/env/bin/python")/dependencies.pth"
"$python" -m pip --python "$work/env/bin/python" install --quiet --no-index --no-deps "$work"/dist/*.whl

mkdir "$work/empty"
cd "$work/empty"
home=$("$work/env/bin/python" -c 'import verideq; print(verideq.__file__)')
[[ $home == "$work"/env/* ]] || { echo "verideq was imported from $home, not from the wheel" >&2; exit 1; }
"$work/env/bin/verideq" certify --limit 20
echo "the sdist ($(wc -l <"$work/sdist") entries) and the wheel ($(wc -l <"$work/wheel") files) hold what they should"
