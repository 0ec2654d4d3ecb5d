#!/bin/bash
# Runs `go test` so that a person sees what matters: one line per top-level test
# as it ends, the whole output of packages that failed, and at the end go's own
# line of each package, every skipped test with its reason, every failed test with
# what it printed, and the counts.
#
# usage: gotest.sh ARGUMENTS OF go test...
#
# Exit status: that of go test. With CI=true a skipped test is a failure, too:
# there, everything that tests need is expected to be present.
set -uo pipefail

tab=$'\t'

# summarise: reads the output of go test -v.
summarise() {
	local line name='' passed=0 failed=0 skipped=0
	local held=() packages=() skips=() failures=()
	local -A said=() # what each test of this package printed
	while IFS= read -r line; do
		case $line in
		'=== '*)
			name=${line##* }
			continue
			;;
		PASS | FAIL | "?   $tab"*)
			continue
			;;
		"ok  $tab"* | "FAIL$tab"*)
			[[ $line != FAIL* ]] || printf '%s\n' ${held[@]+"${held[@]}"}
			echo "$line"
			packages+=("$line")
			held=() said=()
			continue
			;;
		esac
		held+=("$line")
		case $line in
		'--- PASS: '*) passed=$((passed + 1)) ;;
		*'--- FAIL: '*)
			[[ $line == ' '* ]] || failed=$((failed + 1))
			name=${line##*--- FAIL: }
			name=${name%% *}
			failures+=("$line${said[$name]:-}")
			;;
		*'--- SKIP: '*)
			name=${line##*--- SKIP: }
			name=${name%% *}
			skipped=$((skipped + 1))
			skips+=("$line${said[$name]:-}")
			;;
		*'--- PASS: '*) ;;
		*) [ -z "$name" ] || said[$name]+=$'\n'$line ;;
		esac
		[[ $line != ---* ]] || echo "$line"
	done
	# What is left belongs to no package: go test itself failed.
	[ ${#held[@]} -eq 0 ] || printf '%s\n' "${held[@]}"

	echo "----"
	[ ${#packages[@]} -eq 0 ] || printf '%s\n' "${packages[@]}"
	[ ${#skips[@]} -eq 0 ] || printf '%s\n' "skipped:" "${skips[@]}"
	[ ${#failures[@]} -eq 0 ] || printf '%s\n' "failed:" "${failures[@]}"
	echo "top-level tests: $passed passed, $failed failed; tests and subtests skipped: $skipped"
	if [ "$skipped" -gt 0 ] && [ "${CI:-}" = true ]; then
		echo "failed: with CI=true no test may be skipped"
		return 1
	fi
}

# What go itself has to say, as errors of the compiler, it says on standard error.
go test -v "$@" | summarise
status=("${PIPESTATUS[@]}")
[ "${status[0]}" -eq 0 ] || exit "${status[0]}"
exit "${status[1]}"
