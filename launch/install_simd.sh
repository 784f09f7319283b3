#!/usr/bin/env bash
# Put Pillow-SIMD in the place of Pillow: PNG, WebP and odd JPEGs are then decoded and resized about twice as fast.
# Ordinary JPEG frames do not need it, libjpeg-turbo reads those.
#
#   launch/install_simd.sh [PYTHON]      PYTHON: the interpreter of the environment (default: .venv/bin/python, python3)
#
#   SIMD_VERSION=12.1.1.post0            another version
#   SIMD_FLAGS=-mavx2                    compile for AVX2 (default: SSE4); the result runs only where the processor has it
#
# Both packages own the folder PIL, so Pillow goes out before Pillow-SIMD comes in, after everything else is installed:
# whatever installs Pillow again later undoes this; run it again then. Pillow-SIMD lags behind Pillow's security fixes:
# use it for frames you trust. If anything fails, the Pillow that was there is put back.
#
# Exit status: 0 it is in place, 2 something is missing (one line says what), 1 it failed and Pillow was put back.

set -euo pipefail

version=${SIMD_VERSION:-12.1.1.post0}
flags=${SIMD_FLAGS:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${1:-}
if [ -z "$python" ]; then
    python=$here/.venv/bin/python
    [ -x "$python" ] || python=$(command -v python3 || true)
fi

stop() {
    echo "install_simd: $1" >&2
    exit 2
}

"$python" -c '' 2>/dev/null || stop "no working Python at '$python': name one, launch/install_simd.sh PYTHON"
"$python" -m pip --version >/dev/null 2>&1 || stop "$python has no pip: $python -m ensurepip"
command -v "${CC:-cc}" >/dev/null || stop "no C compiler: apt-get install gcc"
for header in jpeglib zlib; do
    printf '#include <stdio.h>\n#include <%s.h>\n' "$header" | "${CC:-cc}" -E - >/dev/null 2>&1 ||
        stop "no header $header.h: apt-get install libjpeg-dev zlib1g-dev"
done

facts() { # what is installed as PIL: name, version, and which formats it reads
    "$python" - <<'PY'
import importlib.metadata as metadata

try:
    import PIL
    from PIL import features
except ImportError:
    print("none none")
    raise SystemExit
names = [n for n in ("pillow", "pillow-simd") if any(d.metadata["Name"].lower() == n for d in metadata.distributions())]
formats = [n for n in ("jpg", "zlib", "webp") if features.check(n)]
print("+".join(names) or "unknown", PIL.__version__, *formats)
PY
}

read -r name before formats <<<"$(facts)"
if [ "$name $before" = "pillow-simd $version" ]; then
    echo "install_simd: Pillow-SIMD $version is in place already"
    exit 0
fi
echo "install_simd: found $name $before ($formats)"

work=$(mktemp -d)
touched=no
put_back() {
    status=$?
    if [ "$status" -ne 0 ] && [ "$touched" = yes ]; then
        echo "install_simd: failed, putting ${name} ${before} back" >&2
        "$python" -m pip uninstall --quiet --yes pillow-simd >/dev/null 2>&1 || true
        "$python" -m pip install --quiet --no-deps --force-reinstall "$work"/old/* >&2
    fi
    rm -rf "$work"
    if [ "$status" -ne 0 ]; then exit 1; fi
}
trap put_back EXIT

# Everything that can fail without touching the environment comes first.
mkdir "$work/old" "$work/new"
case $before in
none) ;;
*post*) "$python" -m pip wheel --quiet --no-deps --no-binary pillow-simd --wheel-dir "$work/old" "pillow-simd==$before" ;;
*) "$python" -m pip download --quiet --no-deps --dest "$work/old" "pillow==$before" ;;
esac
echo "install_simd: compiling Pillow-SIMD $version ${flags:+with $flags}"
CC="${CC:-cc} $flags" "$python" -m pip wheel --quiet --no-deps --no-cache-dir --no-binary pillow-simd \
    --wheel-dir "$work/new" "pillow-simd==$version"

touched=yes
[ "$name" = none ] || "$python" -m pip uninstall --quiet --yes pillow pillow-simd 2>/dev/null
"$python" -m pip install --quiet --no-deps --force-reinstall "$work"/new/*.whl

# Did it take? Version, formats, and pixels: a picture through a file and a reduction, against numbers known beforehand.
"$python" - "$version" <<'PY'
import io
import sys

import PIL
from PIL import Image, features

assert PIL.__version__ == sys.argv[1], f"PIL is {PIL.__version__}"
assert features.check("jpg") and features.check("zlib"), "no JPEG or PNG"
ramp = Image.frombytes("L", (256, 64), bytes(range(256)) * 64).convert("RGB")
for kind, near in (("PNG", 0), ("JPEG", 3)):
    stream = io.BytesIO()
    ramp.save(stream, kind, quality=95)
    read = Image.open(stream).convert("RGB").crop((0, 0, 256, 64)).resize((64, 16), Image.Resampling.BOX)
    for x in range(64):
        assert abs(read.getpixel((x, 8))[0] - (4 * x + 1.5)) <= 1 + near, f"{kind}: wrong pixels"
PY
touched=no

read -r name after now <<<"$(facts)"
echo "install_simd: $name $after is in place ($now)"
if [[ " $formats " == *" webp "* && " $now " != *" webp "* ]]; then
    echo "install_simd: it reads no WebP, the Pillow before did: apt-get install libwebp-dev and run this again if you have WebP frames" >&2
fi
echo "install_simd: to go back: $python -m pip uninstall -y pillow-simd && $python -m pip install --force-reinstall pillow"
