//! Memory and CPU time of a process, from `/proc`.

use std::fs;
use std::time::Duration;

/// Returns a size from `/proc/PID/status`, such as `VmRSS`, in KiB.
pub fn memory_of(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field));
    let kibibytes = line.and_then(|line| line.split_whitespace().nth(1));
    kibibytes.unwrap().parse().unwrap()
}

/// Returns the CPU time of a process, user and system.
pub fn cpu_of(pid: u32) -> Duration {
    let stat = stat(pid).unwrap();
    stat.cpu
}

/// Returns the CPU time of a process and its children, those that have ended included.
pub fn cpu_with_children(pid: u32) -> Duration {
    loop {
        let ended = stat(pid).unwrap().ended_children_cpu;
        let processes = fs::read_dir("/proc").unwrap();
        let pids = processes.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        let children = pids.filter_map(stat).filter(|stat| stat.parent == pid);
        let running = children.map(|child| child.cpu).sum::<Duration>();
        let own = stat(pid).unwrap();
        // Otherwise a child has ended meanwhile, and was counted twice or not at all.
        if own.ended_children_cpu == ended {
            return own.cpu + ended + running;
        }
    }
}

struct Stat {
    parent: u32,
    cpu: Duration,
    /// The CPU time of the children that it has waited for.
    ended_children_cpu: Duration,
}

/// Reads `/proc/PID/stat`; `None` if the process has ended.
fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name may contain spaces; it ends at the last parenthesis.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |index: usize| fields[index].parse::<u64>().unwrap();
    // Linux reports times in hundredths of a second, user and system time one after the other.
    let time = |index: usize| Duration::from_millis(10 * (number(index) + number(index + 1)));
    Some(Stat {
        parent: u32::try_from(number(1)).unwrap(),
        cpu: time(11),
        ended_children_cpu: time(13),
    })
}

/// Reports whether the peer at a port of loopback has closed a connection that a process here still holds open.
pub fn is_closed_by_peer(port: u16) -> bool {
    const CLOSE_WAIT: &str = "08";
    let peer = format!("0100007F:{port:04X}");
    let connections = fs::read_to_string("/proc/net/tcp").unwrap();
    connections.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(2..4) == Some(&[peer.as_str(), CLOSE_WAIT])
    })
}
