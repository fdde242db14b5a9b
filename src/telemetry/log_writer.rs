//! The lines of the log on their way to stderr. A thread of its own writes them, all that have gathered at once: whoever
//! reads them may be slow or stuck, and no admission waits for that. To wake a thread and to write cost more than
//! the line itself, so under load both are done for many lines together. Lines for which there is no place, or that
//! cannot be written, are dropped and counted.

use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;

/// Bytes that wait, at most.
const MOST_WAITING: usize = 1024 * 1024;
/// How long lines gather.
const GATHERING: Duration = Duration::from_millis(5);
/// Longest wait for the last lines, when the program ends.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Where lines are written to; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct LogQueue(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    dropped: Counter,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    is_ending: bool,
}

/// The thread that writes; dropped, it writes what still waits.
#[derive(Debug)]
pub(super) struct WriterThread {
    lines: LogQueue,
    thread: JoinHandle<()>,
}

impl LogQueue {
    /// Starts the thread that writes them.
    ///
    /// # Errors
    /// The system's, if there can be no more threads.
    pub(super) fn write_to(&self, out: impl Write + Send + 'static) -> io::Result<WriterThread> {
        let shared = Arc::clone(&self.0);
        let thread = thread::Builder::new().name("log".to_owned());
        Ok(WriterThread {
            lines: self.clone(),
            thread: thread.spawn(move || shared.write_all(out))?,
        })
    }

    /// Returns the count of dropped lines.
    #[must_use]
    pub fn dropped(&self) -> Counter {
        self.0.dropped.clone()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_all(&self, mut out: impl Write) {
        let mut lines = Vec::new();
        let mut is_ending = false;
        while !is_ending {
            let idle = |waiting: &mut Waiting| waiting.lines.is_empty() && !waiting.is_ending;
            let waiting = self.changed.wait_while(self.lock(), idle);
            let waiting = waiting.unwrap_or_else(PoisonError::into_inner);
            let gathering = |waiting: &mut Waiting| !waiting.is_ending;
            let gathered = self
                .changed
                .wait_timeout_while(waiting, GATHERING, gathering);
            let (mut waiting, _) = gathered.unwrap_or_else(PoisonError::into_inner);
            mem::swap(&mut lines, &mut waiting.lines);
            is_ending = waiting.is_ending;
            drop(waiting);
            if out.write_all(&lines).is_err() {
                let dropped = lines.iter().filter(|&&byte| byte == b'\n').count();
                self.dropped
                    .inc_by(u64::try_from(dropped).unwrap_or(u64::MAX));
            }
            lines.clear();
        }
    }
}

impl Write for LogQueue {
    /// Takes a whole line, or loses it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut waiting = self.0.lock();
        if waiting.lines.len() + line.len() > MOST_WAITING {
            self.0.dropped.inc();
            return Ok(line.len());
        }
        let is_first = waiting.lines.is_empty();
        waiting.lines.extend_from_slice(line);
        drop(waiting);
        if is_first {
            self.0.changed.notify_one();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for WriterThread {
    fn drop(&mut self) {
        self.lines.0.lock().is_ending = true;
        self.lines.0.changed.notify_one();
        let deadline = Instant::now() + LAST_LINES;
        while !self.thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Takes what is written, piece by piece; each write waits until its piece is taken.
    struct Slow(mpsc::SyncSender<String>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            self.0.send(text).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_in_their_order_many_at_once_and_the_last_ones_at_the_end() {
        let (sender, written) = mpsc::sync_channel(100);
        let mut lines = LogQueue::default();
        let writing = lines.write_to(Slow(sender)).unwrap();
        for line in ["a\n", "b\n", "c\n"] {
            lines.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(written.recv().unwrap(), "a\nb\nc\n");
        lines.write_all(b"d\n").unwrap();
        drop(writing);
        assert_eq!(written.recv().unwrap(), "d\n");
        assert_eq!((written.recv().ok(), lines.dropped().get()), (None, 0));
    }

    #[test]
    fn who_writes_never_waits_for_a_reader_that_is_stuck_and_lost_lines_are_counted() {
        let (sender, written) = mpsc::sync_channel(0);
        let mut lines = LogQueue::default();
        let writing = lines.write_to(Slow(sender)).unwrap();
        lines.write_all(b"first\n").unwrap();
        while !lines.0.lock().lines.is_empty() {
            thread::sleep(Duration::from_millis(1));
        }
        // The first is being written, and nobody takes it.
        let line = [b'x'; 1024];
        for _ in 0..MOST_WAITING / line.len() + 3 {
            lines.write_all(&line).unwrap();
        }
        assert_eq!(lines.dropped().get(), 3);
        assert_eq!(written.recv().unwrap(), "first\n");
        assert_eq!(written.recv().unwrap().len(), MOST_WAITING);
        // What cannot be written is lost too.
        drop(written);
        lines.write_all(b"a\nb\n").unwrap();
        drop(writing);
        assert_eq!(lines.dropped().get(), 5);
    }
}
