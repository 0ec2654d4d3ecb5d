#!/bin/bash
# Gets the etcd that the tests start for themselves: the one in PATH, or the
# program out of Debian's package etcd-server, unpacked into a private directory:
#   $DORMOUSE_ETCD_PREFIX (/opt/dormouse/etcd when unset).
# The package is never installed, because that sets up a service that starts with
# the machine. Downloads are verified by apt as for any package.
set -euo pipefail

PREFIX=$(realpath -m "${DORMOUSE_ETCD_PREFIX:-/opt/dormouse/etcd}")

say() { echo "setup: $*"; }
die() {
	echo "setup: $*" >&2
	exit 1
}

# works PROGRAM: prints its version.
works() { "$1" --version 2>/dev/null | awk '/^etcd Version:/ { print $3; found = 1 } END { exit !found }'; }

for etcd in "$(command -v etcd || true)" "$PREFIX/bin/etcd"; do
	if [ -x "$etcd" ] && version=$(works "$etcd"); then
		say "etcd $version at $etcd works"
		exit 0
	fi
done

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
	die "this is no Debian: put an etcd of version 3.4 or newer into PATH yourself"
[ ! -e "$PREFIX" ] || [ -e "$PREFIX/VERSION" ] ||
	die "$PREFIX exists and was not made by this script: move it away or set DORMOUSE_ETCD_PREFIX to another directory"
say "taking etcd out of Debian's package etcd-server into $PREFIX; no service is set up"
mkdir -p "$(dirname "$PREFIX")"
work=$(mktemp -d)
trap 'rm -rf "$work" "$PREFIX.tmp"' EXIT
if ! { apt-get -q -o APT::Update::Error-Mode=any update &&
	cd "$work" && apt-get -q -o APT::Sandbox::User=root download etcd-server; } >"$work/log" 2>&1 </dev/null; then
	tail -n 8 "$work/log" >&2
	die "apt-get could not download etcd-server"
fi
deb=$(echo "$work"/etcd-server_*.deb)
dpkg-deb -x "$deb" "$work/root"
rm -rf "$PREFIX.tmp"
mkdir -p "$PREFIX.tmp/bin"
cp "$work/root/usr/bin/etcd" "$PREFIX.tmp/bin/etcd"
version=$(works "$PREFIX.tmp/bin/etcd") || die "the etcd of $(basename "$deb") does not start on this machine: $("$PREFIX.tmp/bin/etcd" --version 2>&1 | tail -n 1)"
{
	echo "$version"
	sha256sum "$deb" | sed "s|$work/||"
} >"$PREFIX.tmp/VERSION"
rm -rf "$PREFIX"
mv -T "$PREFIX.tmp" "$PREFIX"
say "installed etcd $version at $PREFIX/bin/etcd"
