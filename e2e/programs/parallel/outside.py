"""outside.py HOST PORT: keeps one TCP connection to an echo server outside of the job and prints `NUMBER echoed` for every line that came back;
once the connection is closed, `NUMBER alone`, for ever.
"""

import socket
import sys
import time

outside = socket.create_connection((sys.argv[1], int(sys.argv[2])))
answers = outside.makefile("r")
number, echoed = 0, True
while True:
    number += 1
    if echoed:
        try:
            outside.sendall(b"%d\n" % number)
            echoed = answers.readline() == f"{number}\n"
        except OSError:
            echoed = False
    print(number, "echoed" if echoed else "alone", flush=True)
    time.sleep(0.05)
