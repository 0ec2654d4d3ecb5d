#!/bin/sh
# pipeline.sh STEPS PACE_MS: a shell pipeline. Each step starts short-lived processes, so that some checkpoints meet a
# process that is just being made.
steps=$1
pause=$(awk "BEGIN { print $2 / 1000 }")
i=0
while [ "$i" -lt "$steps" ]; do
	i=$((i + 1))
	echo "$i $(expr "$i" '*' 7 % 101)"
	sleep "$pause"
done |
	awk '{ sum = (sum * 31 + $1 * $2) % 1000003; print "step", $1, $2, sum; fflush() }' |
	sed -u 's/$/ ./'
echo "end"
