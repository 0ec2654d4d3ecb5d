# Prints the decimal digits of pi, 50 a line, each computed when it is due
# (J. Gibbons, "Unbounded Spigot Algorithms for the Digits of Pi", 2006).
import sys

lines = int(sys.argv[1])
q, r, t, k, n, l = 1, 0, 1, 1, 3, 3
for line in range(lines):
    digits = []
    while len(digits) < 50:
        if 4 * q + r - t < n * t:
            digits.append(str(n))
            q, r, n = 10 * q, 10 * (r - n * t), (10 * (3 * q + r)) // t - 10 * n
        else:
            q, r, t, k, n, l = (q * k, (2 * q + r) * l, t * l, k + 1,
                                (q * (7 * k + 2) + r * l) // (t * l), l + 2)
    print(line + 1, "".join(digits), flush=True)
