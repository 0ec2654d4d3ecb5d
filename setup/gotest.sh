#!/bin/bash
# Runs `go test` so that a person sees what matters: one line per top-level test
# as it ends, what a failed test printed with its line, and at the end go's own
# line of each package, every skipped test with its reason, every failed test once
# more, and the counts.
#
# usage: gotest.sh ARGUMENTS OF go test...
#
# Exit status: that of go test. With CI=true a skipped test is a failure, too:
# there, everything that tests need is expected to be present.
set -uo pipefail

tab=$'\t' newline=$'\n'

# summarise: reads the output of go test -v.
summarise() {
	local line name=- passed=0 failed=0 skipped=0
	local packages=() skips=() failures=()
	local -A said=() # what each test that has not ended printed; "-" is no test
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
			[[ $line != FAIL* ]] || printf '%s' "${said[@]}" # of tests that did not come to their end
			echo "$line"
			packages+=("$line")
			name=- said=()
			continue
			;;
		*'--- PASS: '* | *'--- FAIL: '* | *'--- SKIP: '*) ;;
		*)
			said[$name]+=$line$newline
			continue
			;;
		esac
		name=${line##*--- ????: }
		name=${name%% *}
		case $line in
		*'--- FAIL: '*)
			printf '%s\n%s' "$line" "${said[$name]:-}"
			failures+=("$line$newline${said[$name]:-}")
			;;
		*'--- SKIP: '*)
			skipped=$((skipped + 1))
			skips+=("$line$newline${said[$name]:-}")
			;;
		esac
		case $line in
		'--- PASS: '*) passed=$((passed + 1)) ;;
		'--- FAIL: '*) failed=$((failed + 1)) ;;
		esac
		[[ $line != '--- '[PS]* ]] || echo "$line"
		unset "said[$name]"
	done
	# What is left belongs to no package: go test itself failed.
	printf '%s' "${said[@]}"

	echo "----"
	[ ${#packages[@]} -eq 0 ] || printf '%s\n' "${packages[@]}"
	[ ${#skips[@]} -eq 0 ] || printf '%s' "skipped:$newline" "${skips[@]}"
	[ ${#failures[@]} -eq 0 ] || printf '%s' "failed:$newline" "${failures[@]}"
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
