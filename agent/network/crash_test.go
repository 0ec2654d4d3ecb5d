package network

func runVictim([]string) int { return 1 }
