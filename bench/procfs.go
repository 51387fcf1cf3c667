//go:build linux

package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// tick is the unit of CPU time in /proc, on every architecture Linux has Go for.
const tick = 10 * time.Millisecond

// stat is what /proc/<pid>/stat says of a process, as far as it is used here.
type stat struct {
	group int
	cpu   time.Duration // in user and in kernel mode, so far
}

func readStat(path string) (stat, error) {
	line, err := os.ReadFile(path)
	if err != nil {
		return stat{}, err
	}
	// The second field is a name in parentheses, which may have spaces and parentheses itself.
	fields := strings.Fields(string(line[strings.LastIndexByte(string(line), ')')+1:]))
	if len(fields) < 13 {
		return stat{}, fmt.Errorf("%s: %q", path, line)
	}
	var n [3]int64
	for i, field := range []int{2, 11, 12} { // pgrp, utime, stime
		if n[i], err = strconv.ParseInt(fields[field], 10, 64); err != nil {
			return stat{}, fmt.Errorf("%s: %w", path, err)
		}
	}
	return stat{int(n[0]), time.Duration(n[1]+n[2]) * tick}, nil
}

// members returns the processes of the group: a gateway may have workers.
func (p *process) members() (pids []int, cpu time.Duration, err error) {
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, 0, err
	}
	for _, path := range paths {
		s, err := readStat(path)
		if err != nil || s.group != p.pid {
			continue // the process may have ended meanwhile
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		pids, cpu = append(pids, pid), cpu+s.cpu
	}
	if pids == nil {
		return nil, 0, fmt.Errorf("%s has ended:\n%s", p.name, p.said())
	}
	return pids, cpu, nil
}

// cpu returns the CPU time the process has used since it began.
func (p *process) cpu() (time.Duration, error) {
	_, cpu, err := p.members()
	return cpu, err
}

// memory returns a line of /proc/<pid>/status, in bytes: VmRSS is all that is in memory, RssAnon leaves out what is
// only a view of a file, such as a database.
func (p *process) memory(line string) (bytes float64, err error) {
	pids, _, err := p.members()
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		n, err := statusLine(pid, line)
		if err != nil {
			return 0, err
		}
		bytes += n
	}
	return bytes, nil
}

func statusLine(pid int, name string) (bytes float64, err error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+":"); ok {
			kilobytes, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
			return kilobytes * 1024, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status does not say %s", pid, name)
}

// ownCPU returns the CPU time that this process has used.
func ownCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// processorName is what the machine calls its processor.
func processorName() string {
	file, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "an unknown processor"
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if name, value, _ := strings.Cut(lines.Text(), ":"); strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "an unknown processor"
}
