#!/bin/sh
# pipeline.sh STEPS PACE_MS: a shell pipeline. Each step starts short-lived processes, so that some checkpoints meet a
# process that is just being made.
steps=$1
sum=0
pause=$(awk "BEGIN { print $2 / 1000 }")
i=0
while [ "$i" -lt "$steps" ] && [ ! -e "$STOP_FILE" ]; do
	i=$((i + 1))
	echo "$i $(expr "$i" '*' 7 % 101)"
	sleep "$pause"
done |
	while read -r number factor; do
		sum=$(((sum * 31 + number * factor) % 1000003))
		echo "step $number $factor $sum"
	done |
	sed -u 's/$/ ./'
echo "end"
