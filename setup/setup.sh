#!/bin/bash
# Prepares a Debian machine with Go, gcc, make and root for Dormouse's demo and
# tests. Only what is missing is added, every change is said, a second run
# changes nothing, and afterwards no network is needed.
#
# usage: setup.sh [demo|test]    what to prepare for; test (the default) is more
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)

say() { echo "setup: $*"; }
die() {
	echo "setup: $*" >&2
	exit 1
}

missing=()
# need COMMAND PACKAGE: notes the package for installation unless the command exists.
need() {
	command -v "$1" >/dev/null || missing+=("$2")
}

install_missing() {
	[ ${#missing[@]} -gt 0 ] || return 0
	command -v apt-get >/dev/null ||
		die "this is no Debian: install what gives these commands yourself: ${missing[*]}"
	say "installing ${missing[*]}"
	local log
	log=$(mktemp)
	if ! { apt-get -q -o APT::Update::Error-Mode=any update &&
		DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
		tail -n 8 "$log" >&2
		rm -f "$log"
		die "apt-get could not install ${missing[*]}"
	fi
	rm -f "$log"
}

# Debian's package redis-server brings a service that starts with the machine,
# and nothing but a link to the server's program in package redis-tools. So take
# the latter, and make the link.
link_redis_server() {
	command -v redis-server >/dev/null && return
	[ -x /usr/bin/redis-check-rdb ] || die "package redis-tools has no /usr/bin/redis-check-rdb: install redis-server yourself"
	ln -s /usr/bin/redis-check-rdb /usr/local/bin/redis-server
	say "linked /usr/local/bin/redis-server to the server in package redis-tools; no service was set up"
}

# selections: which program each alternative of the MPI families stands for.
selections() {
	! command -v update-alternatives >/dev/null || update-alternatives --get-selections | awk '$1 ~ /^mpi/ { print $1, $3 }'
}

# keep_alternatives: has those that were chosen before the installation chosen
# again: plain mpirun and mpicc go on to be what they were. New ones may stay.
keep_alternatives() {
	local name chosen
	while read -r name chosen; do
		grep -qxF "$name $chosen" <(selections) && continue
		update-alternatives --set "$name" "$chosen" >/dev/null || die "cannot set the alternative $name back to $chosen"
		say "kept $name at $chosen"
	done <<<"$1"
}

case ${1:-test} in
demo | test) purpose=${1:-test} ;;
*) die "usage: setup.sh [demo|test]" ;;
esac
[ "$(id -u)" = 0 ] || die "root is needed: Dormouse saves, moves and restores other processes; run this as root"
command -v go >/dev/null || die "Go is needed and not in PATH: install Go $(awk '$1 == "go" { print $2 }' "$HERE/../go.mod") or newer"
command -v gcc >/dev/null || die "gcc is needed: apt-get install gcc libc6-dev"

[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates) # Go fetches modules over HTTPS
need ip iproute2 # CRIU saves network namespaces with it
need python3 python3
command -v redis-server >/dev/null && need redis-cli redis-tools || need redis-check-rdb redis-tools
if [ "$purpose" = test ]; then
	need node nodejs
	# Both MPIs side by side; the tests call each by its full name.
	need mpirun.openmpi openmpi-bin
	need mpiexec.hydra mpich
	[ -e /usr/lib/"$(gcc -print-multiarch)"/openmpi/include/mpi.h ] || missing+=(libopenmpi-dev)
	[ -e /usr/include/"$(gcc -print-multiarch)"/mpich/mpi.h ] || missing+=(libmpich-dev)
fi
chosen=$(selections)
install_missing
[ -z "$chosen" ] || keep_alternatives "$chosen"
link_redis_server

(cd "$HERE/.." && go mod download) || die "go mod download failed: the modules in go.mod are fetched this once and need the network"
[ "$purpose" != test ] || "$HERE/etcd.sh"
"$HERE/criu.sh"
say "ready"
