// Command web is a web server and its client in one process: web STEPS PACE_MS.
//
// Each step posts the newest link of a hash chain over one kept-alive
// connection, passes it through a row of goroutines and waits for a timer.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: web STEPS PACE_MS")
	}
	steps, err := strconv.Atoi(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	pace, err := strconv.Atoi(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	url, connections := serve()
	in, out := row(20)
	link := "begin"
	timer := time.NewTicker(time.Duration(max(pace, 1)) * time.Millisecond)
	for step := 1; step <= steps && !askedToEnd(); step++ {
		in <- post(url, link)
		link = <-out
		fmt.Printf("step %d %s connections %d\n", step, link, connections.Load())
		if pace > 0 {
			<-timer.C
		}
	}
	fmt.Println("end", link)
}

// askedToEnd tells whether the file is there that STOP_FILE names.
func askedToEnd() bool {
	_, err := os.Stat(os.Getenv("STOP_FILE"))
	return err == nil
}

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:16])
}

// serve answers each post with the hash of its number and body.
func serve() (url string, connections *atomic.Int64) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	connections = new(atomic.Int64)
	served := 0 // there is one client, which waits for each answer
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				log.Fatal(err)
			}
			served++
			io.WriteString(w, hash(strconv.Itoa(served)+string(body)))
		}),
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				connections.Add(1)
			}
		},
	}
	go server.Serve(listener)
	return "http://" + listener.Addr().String(), connections
}

func post(url, body string) string {
	response, err := http.Post(url, "text/plain", strings.NewReader(body))
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err)
	}
	return string(answer)
}

// row is a row of goroutines, each of which adds its own hash.
func row(n int) (in chan<- string, out <-chan string) {
	first := make(chan string)
	from := first
	for i := range n {
		to := make(chan string)
		go func(from <-chan string) {
			for text := range from {
				to <- hash(strconv.Itoa(i) + text)
			}
		}(from)
		from = to
	}
	return first, from
}
