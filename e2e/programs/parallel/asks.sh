#!/bin/sh
# asks.sh ASKER STEPS PACE_S: every task counts; task ASKER asks for a checkpoint
# at step 10 and prints how that went, in the original run and in a restored one.
i=0
while [ $i -lt "$2" ]; do
	i=$((i + 1))
	echo $i
	if [ $i = 10 ] && [ "$DORMOUSE_TASK" = "$1" ]; then
		dormouse-ctl checkpoint --label middle
		echo "status $?"
	fi
	sleep "$3"
done
