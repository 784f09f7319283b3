#!/usr/bin/env bash
# launch/test.sh on clean clones of the last commit under several conditions, a line for each: all must be green.
#
#     bash tests/long/conditions.sh                              all conditions, the whole fast tier
#     bash tests/long/conditions.sh quiet c_locale -- tests/test_index.py
#
#   quiet        nothing beside it
#   busy         beside two processes that compute
#   one_thread   OMP_NUM_THREADS=1 given from outside
#   c_locale     LANG=C, LC_ALL=C, umask 077
#   other_user   as the user nobody (started as root only)
#
# VAC_PYTHON=/path/to/python uses that environment, which nobody must be able to read; without it every clone makes its
# own. LOGS=DIR keeps the output there. Exit status: 0 all green, 1 some not.
set -uo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

conditions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    conditions+=("$1")
    shift
done
[ $# = 0 ] || shift
[ ${#conditions[@]} -gt 0 ] || conditions=(quiet busy one_thread c_locale other_user)

work=$(mktemp -d)
logs=${LOGS:-$work}
mkdir -p "$logs"
chmod 755 "$work"
busy=()
calm() {
    [ ${#busy[@]} = 0 ] || kill "${busy[@]}"
    busy=()
}
trap 'calm; rm -rf "$work"' EXIT

run() { # condition, arguments of pytest
    local how=$1 as=()
    shift
    case $how in
    quiet | busy) ;;
    one_thread) export OMP_NUM_THREADS=1 ;;
    c_locale)
        export LANG=C LC_ALL=C
        umask 077
        ;;
    other_user)
        [ "$(id -u)" = 0 ] || { echo "becoming another user needs root"; return 1; }
        chown -R nobody "$work/$how"
        as=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
        ;;
    *) echo "no such condition: $how"; return 1 ;;
    esac
    cd "$work/$how/vac_ddp" || return
    "${as[@]}" env HOME="$work/$how/home" TMPDIR="$work/$how/tmp" bash launch/test.sh "$@"
}

bad=0
for how in "${conditions[@]}"; do
    mkdir -p "$work/$how/home" "$work/$how/tmp"
    git clone --quiet "$repo" "$work/$how/vac_ddp" || exit
    if [ "$how" = busy ]; then
        for _ in 1 2; do
            (while :; do :; done) &
            busy+=($!)
        done
    fi
    begun=$SECONDS
    (run "$how" "$@") >"$logs/$how.log" 2>&1 </dev/null
    status=$?
    calm
    [ $status = 0 ] || bad=1
    printf '%-12s exit status %-3d %5d s  %s\n' "$how" $status $((SECONDS - begun)) "$(tail -n 1 "$logs/$how.log")"
    [ $status = 0 ] || grep -E '^(FAILED|ERROR)' "$logs/$how.log"
    rm -rf "${work:?}/$how"
done
exit $bad
