#!/bin/bash
# Gets a CRIU that works on this machine.
#
# The first that exists of $DORMOUSE_CRIU, $DORMOUSE_PREFIX/sbin/criu and the
# criu in PATH is used as it is if it passes setup/probe.sh. If not, CRIU 4.2.1
# or newer is taken from Debian's newer suites, together with every library it
# needs down to the C library, into a private directory:
#   $DORMOUSE_PREFIX (/opt/dormouse/criu when unset).
# Nothing of the system changes: apt runs with lists, cache and package states
# of its own, on the mirror that this machine already uses, verified with this
# machine's own Debian keyring; packages are unpacked, never installed.
set -euo pipefail

STANDARD=/opt/dormouse/criu # where dormouse looks by itself
PREFIX=$(realpath -m "${DORMOUSE_PREFIX:-$STANDARD}")
WANTED=4.2.1
SUITES="testing unstable"
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
HERE=$(cd "$(dirname "$0")" && pwd)

say() { echo "setup: $*"; }
die() {
	echo "setup: $*" >&2
	exit 1
}

# usable CRIU: probes it and says the outcome.
usable() {
	local version why
	why=$(mktemp)
	if version=$("$HERE/probe.sh" "$1" 2>"$why"); then
		rm -f "$why"
		say "CRIU $version at $1 works (probe passed)"
		return 0
	fi
	say "CRIU at $1 cannot be used: $(cat "$why")"
	rm -f "$why"
	return 1
}

# find_usable: succeeds when a CRIU that is already here works. It looks where
# dormouse looks, in the same order, and stops where dormouse would.
find_usable() {
	local path
	if [ -n "${DORMOUSE_CRIU:-}" ]; then
		usable "$DORMOUSE_CRIU" || die "DORMOUSE_CRIU names a CRIU that does not work: name another one, or unset it"
	elif [ -e "$PREFIX/sbin/criu" ]; then
		usable "$PREFIX/sbin/criu"
	else
		path=$(command -v criu || true)
		[ -n "$path" ] && usable "$path"
	fi
}

# mirrors: the Debian mirrors in this machine's own apt configuration.
mirrors() {
	apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
		awk -v release="$1" '$2 == release && !seen[$1]++ { print $1 }'
}

# private_apt SUITE MIRROR KEYRING: writes an apt configuration that knows only
# that suite and no installed package, so that apt resolves every dependency.
private_apt() {
	local dir=$work/$1
	rm -rf "$dir"
	mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
	: >"$dir/status"
	cat >"$dir/suite.sources" <<-EOF
		Types: deb
		URIs: $2
		Suites: $1
		Components: main
		Signed-By: $3
	EOF
	cat >"$dir/apt.conf" <<-EOF
		#clear APT::Update::Post-Invoke;
		#clear APT::Update::Post-Invoke-Success;
		#clear Acquire::IndexTargets::deb::DEP-11;
		Acquire::Languages "none";
		APT::Default-Release "";
		APT::Sandbox::User "root";
		APT::Update::Error-Mode "any";
		APT::Install-Recommends "false";
		Dir::Etc::sourcelist "$dir/suite.sources";
		Dir::Etc::sourceparts "/dev/null";
		Dir::Etc::preferences "/dev/null";
		Dir::Etc::preferencesparts "/dev/null";
		Dir::State "$dir/state";
		Dir::State::status "$dir/status";
		Dir::Cache "$dir/cache";
		$dates
	EOF
	apt-get -q -c "$dir/apt.conf" update >"$work/apt.log" 2>&1
}

# newer_keyring MIRROR: Debian's keyring as this machine's own release has it
# today, verified with the one installed; for an image older than a new key.
newer_keyring() {
	private_apt "$codename" "$1" "$KEYRING" || return 1
	(cd "$work" && apt-get -q -c "$work/$codename/apt.conf" download debian-archive-keyring) >"$work/apt.log" 2>&1 || return 1
	dpkg-deb -x "$work"/debian-archive-keyring_*.deb "$work/keyring"
	[ -e "$work/keyring/$KEYRING" ] && KEYRING=$work/keyring/$KEYRING
}

# read_suite SUITE MIRROR: reads the suite's package list, and overcomes a keyring
# and a date that are too old. Nothing is ever read without a good signature.
read_suite() {
	private_apt "$1" "$2" "$KEYRING" && return
	if grep -q 'NO_PUBKEY\|is not signed' "$work/apt.log"; then
		say "this machine's Debian keyring is too old for $1: reading a newer one, verified with it"
		newer_keyring "$2" || return 1
		private_apt "$1" "$2" "$KEYRING" && return
	fi
	if grep -q 'is expired\|not valid yet' "$work/apt.log"; then
		say "the mirror is behind or this machine's clock is wrong: using the package list of $1 outside its dates, its signature is good"
		dates='Acquire::Check-Valid-Until "false"; Acquire::Check-Date "false";'
		private_apt "$1" "$2" "$KEYRING" && return
	fi
	return 1
}

# choose_suite: leaves in $suite the first suite that has the wanted CRIU.
choose_suite() {
	local mirror version
	for mirror in $(mirrors "$codename"); do
		for suite in $SUITES; do
			say "reading the package list of Debian $suite"
			read_suite "$suite" "$mirror" || continue
			version=$(apt-cache -c "$work/$suite/apt.conf" policy criu | awk '/Candidate:/ { print $2 }')
			dpkg --compare-versions "${version:-0}" ge "$WANTED" && return 0
			echo "Debian $suite has criu ${version:-(none)}, $WANTED or newer is needed" >"$work/apt.log"
		done
	done
	[ -s "$work/apt.log" ] || echo "no Debian mirror for $codename in /etc/apt" >"$work/apt.log"
	die "cannot get CRIU $WANTED from Debian's newer suites, which needs the network this once:
$(grep -v '^Get:\|^Hit:\|^Ign:' "$work/apt.log" | tail -n 6 | sed 's/^/    /')"
}

# fetch: downloads CRIU, patchelf and all they depend on, and unpacks them.
fetch() {
	local conf=$work/$suite/apt.conf deb
	say "downloading criu and its libraries from Debian $suite"
	apt-get -q -y -c "$conf" install --download-only criu patchelf >"$work/apt.log" 2>&1 ||
		die "the download failed:
$(tail -n 6 "$work/apt.log" | sed 's/^/    /')"
	for deb in "$work/$suite"/cache/archives/*.deb; do
		dpkg-deb -x "$deb" "$work/root"
	done
}

# assemble: copies the program and the libraries it loads into $PREFIX.tmp.
# The program that is tried there and the one that moves to $PREFIX differ only
# in the path of their loader, which the kernel wants to be absolute.
assemble() {
	local libs loader original where
	loader=$(find "$work/root" -name 'ld-linux*.so.*' -type f | head -n 1)
	original=$(find "$work/root" -path '*/sbin/criu' -type f)
	libs=$(dirname "$(find "$work/root" -name 'libc.so.6' | head -n 1)")
	rm -rf "$PREFIX.tmp"
	mkdir -p "$PREFIX.tmp/sbin" "$PREFIX.tmp/lib"

	# The rest of the C library and libgcc are for libraries given in LD_PRELOAD
	# and for what the C library opens by itself.
	"$loader" --library-path "$libs" --list "$original" |
		awk -v libs="$libs/" 'index($3, libs) == 1 { print $3 }' |
		sort -u - <(printf "$libs/%s\n" "${loader##*/}" libgcc_s.so.1 libdl.so.2 libm.so.6 libpthread.so.0 librt.so.1) |
		xargs cp -L -t "$PREFIX.tmp/lib"

	for where in "$PREFIX.tmp" "$PREFIX"; do
		cp "$original" "$PREFIX.tmp/sbin/criu.for-${where##*/}"
		"$loader" --library-path "$libs" "$(find "$work/root" -path '*/bin/patchelf' -type f)" \
			--set-interpreter "$where/lib/${loader##*/}" --force-rpath --set-rpath '$ORIGIN/../lib' \
			"$PREFIX.tmp/sbin/criu.for-${where##*/}"
	done
}

# install_prefix: tries what was assembled, then puts it in place in one rename.
install_prefix() {
	local name=${PREFIX##*/} version
	mv "$PREFIX.tmp/sbin/criu.for-$name.tmp" "$PREFIX.tmp/sbin/criu"
	version=$("$HERE/probe.sh" "$PREFIX.tmp/sbin/criu" 2>"$work/why") ||
		die "CRIU from Debian $suite does not work on this machine (kernel $(uname -r)): $(cat "$work/why")"
	mv "$PREFIX.tmp/sbin/criu.for-$name" "$PREFIX.tmp/sbin/criu"
	{
		echo "$version"
		echo "# from Debian $suite on $(date -u +%F): package version, SHA-256 of the package file"
		(cd "$work/$suite/cache/archives" && sha256sum -- *.deb) | awk '{ print $2, $1 }'
	} >"$PREFIX.tmp/VERSION"

	rm -rf "$PREFIX.old"
	[ ! -e "$PREFIX" ] || mv -T "$PREFIX" "$PREFIX.old"
	mv -T "$PREFIX.tmp" "$PREFIX"
	rm -rf "$PREFIX.old"
	say "installed CRIU $version at $PREFIX/sbin/criu ($(du -sh "$PREFIX" | cut -f1), probe passed)"
	[ "$PREFIX" = "$STANDARD" ] || say "dormouse looks there only when it is told: export DORMOUSE_CRIU=$PREFIX/sbin/criu"
}

[ "$(id -u)" = 0 ] || die "root is needed: CRIU saves and restores other processes; run this as root"
unshare --mount --pid --net --fork true ||
	die "this root may not make namespaces (it lacks CAP_SYS_ADMIN), so no CRIU can work here: use a real or virtual machine, or a privileged container"
command -v gcc >/dev/null || die "gcc is needed to try CRIU out: apt-get install gcc libc6-dev"
mkdir -p "$(dirname "$PREFIX")"
exec 9<"$(dirname "$PREFIX")"
flock 9 # one set-up at a time

if find_usable; then
	exit 0
fi

say "taking CRIU $WANTED or newer from Debian's newer suites into $PREFIX; the system itself is not changed"
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
	die "this is no Debian: install CRIU $WANTED or newer yourself and set DORMOUSE_CRIU to its path"
case $(dpkg --print-architecture) in
amd64 | arm64) ;;
*) die "CRIU is not set up on $(dpkg --print-architecture), only on amd64 and arm64: install CRIU $WANTED or newer yourself and set DORMOUSE_CRIU to its path" ;;
esac
[ ! -e "$PREFIX" ] || [ -e "$PREFIX/VERSION" ] ||
	die "$PREFIX exists and was not made by this script: move it away or set DORMOUSE_PREFIX to another directory"
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")

dates=''
work=$(mktemp -d)
trap 'rm -rf "$work" "$PREFIX.tmp"' EXIT
choose_suite
fetch
assemble
install_prefix
