#!/bin/bash
# Finds out whether a CRIU really works here: it dumps, kills and restores a
# small process that has a listening and an established TCP socket, and compares
# what that process answers before and after. `criu check` is not enough: CRIUs
# that pass it still fail on every TCP socket of a newer kernel.
#
# usage: probe.sh CRIU          exit 0: works (prints its version)
#                               exit 1: does not (prints why on standard error)
#
# Everything happens in pid, mount and network namespaces of its own and in a
# directory that is removed: nothing can be left behind or collide.
set -euo pipefail

PORT=7999

criu_version() {
	"$1" --version 2>/dev/null | awk '/^Version:/ { print $2; exit }'
}

# last_errors LOG: CRIU's own explanation. The first error line is often a
# harmless one about RLIMIT_NOFILE, so that one is left out.
last_errors() {
	grep -a 'Error (' "$1" 2>/dev/null | grep -av 'RLIMIT_NOFILE for self' | tail -n 4 | sed 's/^/    /' || true
}

fail() {
	echo "$*" >&2
	exit 1
}

# answer: one call to the process under test.
answer() {
	local line
	exec 3<>"/dev/tcp/127.0.0.1/$PORT" || return 1
	read -r -t 10 line <&3 || return 1
	exec 3<&- 3>&-
	echo "$line"
}

# run_criu LOG ARGS...: runs CRIU with a time limit, explains a failure.
run_criu() {
	local log=$1 step=$2 rc=0
	shift
	timeout -k 10 60 "$criu" "$@" -D "$dir/images" -o "$dir/$log" -v4 --tcp-established \
		--manage-cgroups=ignore --network-lock skip >"$dir/output" 2>&1 </dev/null || rc=$?
	[ $rc -eq 0 ] && return
	echo "criu $step failed (exit status $rc):" >&2
	last_errors "$dir/$log" >&2
	grep -av 'RLIMIT_NOFILE for self' "$dir/output" | tail -n 4 | sed 's/^/    /' >&2 || true
	exit 1
}

inside() {
	local criu=$1 dir=$2 word pid got
	word=w$RANDOM$RANDOM
	mkdir "$dir/images"

	pid=$("$dir/probe" "$PORT" "$word")
	got=$(answer) || fail "the process under test does not answer on TCP port $PORT before the dump"
	[ "$got" = "$word 1" ] || fail "the process under test answered '$got' instead of '$word 1' before the dump"

	run_criu dump.log dump -t "$pid"
	kill -0 "$pid" 2>/dev/null && fail "criu dump left process $pid running"

	run_criu restore.log restore -d
	got=$(answer) || fail "criu restore succeeded, but the restored process does not answer"
	[ "$got" = "$word 2" ] || fail "the restored process answered '$got' instead of '$word 2'"
}

outside() {
	local criu=$1 version
	[ "$(id -u)" = 0 ] || fail "only root can probe CRIU"
	[ -x "$criu" ] || fail "there is no executable $criu"
	version=$(criu_version "$criu" || true)
	[ -n "$version" ] || fail "it does not start: $("$criu" --version 2>&1 </dev/null | tail -n 1 || true)"
	[ "${version%%.*}" -ge 4 ] 2>/dev/null || fail "its version is $version, 4 or newer is needed"

	dir=$(mktemp -d)
	trap 'rm -rf "$dir"' EXIT
	gcc -O1 -o "$dir/probe" "$(dirname "$0")/probe.c" || fail "gcc cannot compile the process to test with"
	unshare --mount --pid --fork --kill-child --mount-proc --net "$BASH" "$0" --inside "$criu" "$dir" ||
		exit 1
	echo "$version"
}

case ${1:-} in
--inside) inside "$2" "$3" ;;
'' | -*) fail "usage: probe.sh CRIU" ;;
*) outside "$1" ;;
esac
