package mesh

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

const (
	jobRetry   = time.Second     // after a store that could not take the end of a job
	haltTime   = 5 * time.Second // for what is on its way when the configuration or the process ends
	returnTime = 2 * time.Second // for what the end of the process has stopped to be in the store
)

// jobRunner is a handler's pool of workers. It holds the store until its last job has ended, which may be after the end
// of its configuration: what runs is left alone by a reload, and what waits is for the next configuration's.
type jobRunner struct {
	h     *Handler
	store JobStore // nil where it has not been started, or the store keeps no jobs
	queue string

	slots *jobSlots  // a worker that takes a job, or waits for one, has one of them
	turn  sync.Mutex // of the worker that waits for a slot

	queueless atomic.Bool // it is not to run any: see (*App).settleQueues

	halting context.Context // ends when the configuration does
	halt    context.CancelFunc
	idle    chan struct{} // is closed when the last job has ended, and none will begin
	ended   chan struct{} // is closed when all has ended
	stopped sync.Once
	exited  sync.Once

	waiting atomic.Int64 // jobs in the queue, when they were last counted; negative where they could not be

	mu   sync.Mutex
	runs []*JobRun
}

func newJobRunner(h *Handler) *jobRunner {
	r := &jobRunner{h: h, queue: h.async.queue, idle: make(chan struct{}), ended: make(chan struct{})}
	r.halting, r.halt = context.WithCancel(context.Background())
	return r
}

// start starts the workers.
func (r *jobRunner) start() error {
	store, err := r.h.store.acquire()
	if err != nil {
		return err
	}
	jobs, ok := store.(JobStore)
	if !ok {
		r.h.releaseStore()
		return nil
	}
	r.store, r.slots = jobs, r.h.shareJobSlots()
	go r.live()
	return nil
}

// live ends with the last job after the end of the configuration.
func (r *jobRunner) live() {
	defer close(r.ended)
	defer r.h.releaseStore()
	defer r.h.leaveJobSlots()
	jobRunners.Store(r, nil)
	defer jobRunners.Delete(r)
	var tending sync.WaitGroup
	tending.Go(r.take)
	tending.Go(r.tend)
	tending.Go(r.sweep)
	tending.Wait()
}

// stop has no further jobs begin. Those that run go on, unless the process ends.
func (r *jobRunner) stop() {
	if r != nil { // which it is where the configuration was wrong
		r.stopped.Do(r.stopOnce)
	}
}

func (r *jobRunner) stopOnce() {
	r.halt()
	switch {
	case r.store == nil:
	case caddy.Exiting():
		r.exit()
	case r.running() == 0:
		r.endsWithin(haltTime)
	}
}

// exit ends the runner with the process. A job that comes to its end while that is waited for has ended as any other; those
// that do not are stopped, and wait again.
func (r *jobRunner) exit() {
	r.exited.Do(func() {
		if !r.endsWithin(haltTime) {
			r.haltAll()
			r.endsWithin(returnTime) // whoever is started next finds what is left
		}
	})
}

// exitJobs ends the runners of all configurations there were, when the process ends.
func exitJobs() {
	var exiting sync.WaitGroup
	jobRunners.Range(func(runner, _ any) bool {
		exiting.Go(runner.(*jobRunner).exit)
		return true
	})
	exiting.Wait()
}

func (r *jobRunner) endsWithin(limit time.Duration) bool {
	select {
	case <-r.ended:
		return true
	case <-time.After(limit):
		return false
	}
}

func (r *jobRunner) haltAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, run := range r.runs {
		run.halt()
	}
}

func (r *jobRunner) running() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.runs)
}

// cancel stops a job that was cancelled, if it runs here. Else whoever runs it hears of it from the store.
func (r *jobRunner) cancel(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, run := range r.runs {
		if run.Job.ID == id {
			run.stop(errJobCancelled)
		}
	}
}

// take runs jobs as they come, as many at a time as there are workers.
func (r *jobRunner) take() {
	defer close(r.idle)
	if r.queueless.Load() {
		return
	}
	var workers sync.WaitGroup
	for range r.h.async.workers {
		workers.Go(r.worker)
	}
	workers.Wait()
}

func (r *jobRunner) worker() {
	for r.workOnce() == nil {
	}
}

// workOnce waits for a job and runs it. It returns an error only when the runner is to take no more.
func (r *jobRunner) workOnce() error {
	if err := r.takeSlot(); err != nil {
		return err
	}
	defer r.slots.free()
	run, err := r.store.TakeJob(r.halting, r.queue)
	if err != nil {
		return err
	}
	r.add(run)
	defer r.remove(run)
	if r.halting.Err() != nil && r.giveBack(run) { // it was taken just then
		return r.halting.Err()
	}
	r.work(run)
	return nil
}

// takeSlot has one worker wait for all: each slot that is free again would wake them else.
func (r *jobRunner) takeSlot() error {
	r.turn.Lock()
	defer r.turn.Unlock()
	return r.slots.take(r.halting, r.h.async.workers)
}

func (r *jobRunner) add(run *JobRun) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.runs = append(r.runs, run)
}

func (r *jobRunner) remove(run *JobRun) {
	run.stop(nil)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.runs = slices.DeleteFunc(r.runs, func(other *JobRun) bool { return other == run })
}

// tend keeps the jobs that run this instance's.
func (r *jobRunner) tend() {
	ticker := time.NewTicker(jobBeat)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-r.idle:
			return
		}
		r.mu.Lock()
		runs := slices.Clone(r.runs)
		r.mu.Unlock()
		if len(runs) > 0 {
			r.store.KeepJobs(context.Background(), r.queue, runs)
		}
	}
}

// sweep removes what is past its time, and counts what waits.
func (r *jobRunner) sweep() {
	ticker := time.NewTicker(jobSweep)
	defer ticker.Stop()
	defer r.waiting.Store(0) // the next configuration's runner has them
	sweeping := trouble{message: "jobs that are past their time cannot be removed"}
	for {
		n, err := r.store.WaitingJobs(r.halting, r.queue)
		if err != nil {
			n = -1
		}
		r.waiting.Store(n)
		select {
		case <-ticker.C:
		case <-r.halting.Done():
			return
		}
		err = r.store.SweepJobs(r.halting, r.queue)
		if r.halting.Err() != nil {
			return
		}
		if errors.Is(err, errUnavailable) { // of which the store itself speaks
			err = nil
		}
		sweeping.note(r.h.logger, err)
	}
}

// work runs a job, and has the store know how it ended.
func (r *jobRunner) work(run *JobRun) {
	call, end := r.h.runJob(r.store, run)
	cause := context.Cause(run.ctx)
	if end.Event.Outcome == OutcomeClientGone && cause == errJobHalted {
		r.giveBack(run)
		return
	}
	if cause == errJobCancelled {
		end.Status, end.Response, end.Error = JobCancelled, nil, nil
	}
	if r.finish(run, end) {
		call.count()
		collectors.jobs.WithLabelValues(string(end.Status)).Inc()
	}
}

// giveBack has a job wait again.
func (r *jobRunner) giveBack(run *JobRun) bool {
	err := r.store.ReturnJob(context.Background(), run)
	if err != nil {
		r.log(run, "a job could not be given back", err)
	}
	return err == nil
}

// finish records the end of a job, and reports whether it is this one that counts. It tries for as long as the job may be
// this run's.
func (r *jobRunner) finish(run *JobRun, end JobEnd) bool {
	failing := false
	for {
		err := r.store.FinishJob(context.Background(), run, end)
		switch {
		case err == nil:
			return true
		case errors.Is(err, errJobLost):
			r.log(run, "a job has been run by another as well; its end here does not count", err)
			return false
		case !failing:
			failing = true
			r.log(run, "the end of a job cannot be recorded yet", err)
		}
		if caddy.Exiting() {
			return false // it is run again
		}
		time.Sleep(jobRetry)
	}
}

func (r *jobRunner) log(run *JobRun, message string, err error) {
	r.h.logger.Warn(message, zap.String("job", run.Job.ID), zap.String("request_id", run.Job.RequestID), zap.Error(err))
}
