// Program ledger is a small database of numbers, and its client.
//
//	ledger serve FILE ADDRESS     keeps numbers in FILE: a number is on stable storage before it is acknowledged
//	ledger write ADDRESS FILE N   commits N, N + 1, ... and notes in FILE what was acknowledged, until it is ended
//	ledger read ADDRESS           prints the numbers that the server has
//
// A number whose acknowledgement was lost may be there or not. A line that was cut off by a crash is dropped at the start.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A connection or an answer that takes longer is given up; longer than a volume waits for a replica that is swapped out.
const timeout = 4 * time.Second

// Pause before another try.
const pause = 100 * time.Millisecond

func main() {
	err := errors.New("usage: ledger serve FILE ADDRESS | write ADDRESS FILE N | read ADDRESS")
	switch args := os.Args[1:]; {
	case len(args) == 3 && args[0] == "serve":
		err = serve(args[1], args[2])
	case len(args) == 4 && args[0] == "write":
		err = write(args[1], args[2], args[3])
	case len(args) == 2 && args[0] == "read":
		err = read(args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "ledger:", err)
		os.Exit(1)
	}
}

type store struct {
	mutex sync.Mutex
	file  *os.File
}

func serve(path, address string) error {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	kept, err := io.ReadAll(file)
	if err != nil {
		return err
	}
	whole := int64(bytes.LastIndexByte(kept, '\n') + 1)
	if err := file.Truncate(whole); err != nil {
		return err
	}
	if _, err := file.Seek(whole, io.SeekStart); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Printf("serves %d numbers\n", bytes.Count(kept[:whole], []byte("\n")))
	database := &store{file: file}
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go database.answer(connection)
	}
}

func (s *store) answer(connection net.Conn) {
	defer connection.Close()
	lines := bufio.NewScanner(connection)
	for lines.Scan() {
		reply, err := s.command(lines.Text())
		if err != nil {
			// Nothing that follows a failed write may be acknowledged: what is on the disk is unknown.
			fmt.Fprintln(os.Stderr, "ledger:", err)
			os.Exit(2)
		}
		if _, err := connection.Write(reply); err != nil {
			return
		}
	}
}

func (s *store) command(line string) ([]byte, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if line == "all" {
		kept, err := os.ReadFile(s.file.Name())
		return append(kept, ".\n"...), err
	}
	if _, err := strconv.ParseUint(line, 10, 64); err != nil {
		return []byte("no number\n"), nil
	}
	if _, err := s.file.WriteString(line + "\n"); err != nil {
		return nil, err
	}
	if err := s.file.Sync(); err != nil {
		return nil, err
	}
	return []byte(line + "\n"), nil
}

func write(address, path, first string) error {
	number, err := strconv.ParseUint(first, 10, 64)
	if err != nil {
		return err
	}
	ledger, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	for {
		if err := commit(address, ledger, &number); err != nil {
			fmt.Printf("%s before %d: %v\n", time.Now().UTC().Format("15:04:05.000"), number, err)
		}
		time.Sleep(pause)
	}
}

// Commits one number after the other over one connection, until it fails.
func commit(address string, ledger *os.File, number *uint64) error {
	connection, err := net.DialTimeout("tcp", address, timeout)
	if err != nil {
		return err
	}
	defer connection.Close()
	answers := bufio.NewReader(connection)
	for {
		line := strconv.FormatUint(*number, 10) + "\n"
		// A number is never tried twice: an answer of the first try must not count for the second.
		*number++
		if err := connection.SetDeadline(time.Now().Add(timeout)); err != nil {
			return err
		}
		if _, err := io.WriteString(connection, line); err != nil {
			return err
		}
		answer, err := answers.ReadString('\n')
		if err != nil {
			return err
		}
		if answer != line {
			return fmt.Errorf("the answer is %q", answer)
		}
		stamped := fmt.Sprintf("%s %d\n", strings.TrimSpace(line), time.Now().UnixMicro())
		if _, err := ledger.WriteString(stamped); err != nil {
			return err
		}
	}
}

func read(address string) error {
	connection, err := net.DialTimeout("tcp", address, timeout)
	if err != nil {
		return err
	}
	defer connection.Close()
	if err := connection.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(connection, "all\n"); err != nil {
		return err
	}
	lines := bufio.NewScanner(connection)
	for lines.Scan() {
		if lines.Text() == "." {
			return nil
		}
		fmt.Println(lines.Text())
	}
	return errors.New("the list was cut off")
}
