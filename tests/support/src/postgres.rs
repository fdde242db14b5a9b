//! A real PostgreSQL for the tests: a shared cluster with one database per test, and separate clusters for tests that
//! break theirs. Each listens on loopback and on a Unix socket in its temporary folder. It stops with the test process.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::process::{cpu_of, cpu_with_children};
use super::program::wait_for;

/// The password of the roles `owner` and `reader`.
pub const PASSWORD: &str = "correct-horse-battery-staple";

/// A running server.
pub struct Cluster {
    binaries: PathBuf,
    folder: PathBuf,
    port: u16,
    /// Stops the server when this process closes the pipe, even by being killed.
    _supervisor: Child,
}

/// Creates and starts a cluster, waits until stdin closes, then stops it and removes its folder.
const SUPERVISOR: &str = r#"
    set -eu
    cd "$2"
    printf %s "$3" > password
    "$1/initdb" --pgdata=data --username=owner --auth=scram-sha-256 --pwfile=password \
        --no-sync --encoding=UTF8 --locale=C > initdb.log 2>&1
    cat >> data/postgresql.conf <<CONF
listen_addresses = '127.0.0.1'
port = $4
ssl = $5
ssl_cert_file = '$2/tls.crt'
ssl_key_file = '$2/tls.key'
unix_socket_directories = '$2'
fsync = off
max_connections = 200
CONF
    "$1/pg_ctl" --pgdata=data --log=server.log --wait start > /dev/null
    cat > /dev/null
    "$1/pg_ctl" --pgdata=data --mode=immediate stop > /dev/null || true
    cd /
    rm -rf "$2"
"#;

impl Cluster {
    /// Starts a cluster.
    pub fn start() -> Arc<Self> {
        Self::start_with(None)
    }

    /// Starts a cluster that serves TLS with this certificate and key in PEM.
    pub fn with_certificate(pem: &(String, String)) -> Arc<Self> {
        Self::start_with(Some(pem))
    }

    fn start_with(tls: Option<&(String, String)>) -> Arc<Self> {
        let binaries = binaries();
        let folder = tempfile::Builder::new()
            .prefix("pg-")
            .tempdir()
            .unwrap()
            .keep();
        for (name, pem) in tls
            .iter()
            .flat_map(|(certificate, key)| [("tls.crt", certificate), ("tls.key", key)])
        {
            fs::write(folder.join(name), pem).unwrap();
            restrict_to_postgres(&folder.join(name));
        }
        restrict_to_postgres(&folder);
        let port = free_port();
        let supervisor = as_postgres("sh")
            .args(["-c", SUPERVISOR, "supervisor"])
            .args([binaries.as_os_str(), folder.as_os_str()])
            .arg(PASSWORD)
            .arg(port.to_string())
            .arg(if tls.is_some() { "on" } else { "off" })
            .current_dir(&folder)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let cluster = Self {
            binaries,
            folder,
            port,
            _supervisor: supervisor,
        };
        wait_for("PostgreSQL answers", || {
            let answer = cluster.psql("postgres", "SELECT 1").output().unwrap();
            answer.status.success().then_some(())
        });
        cluster.execute("postgres", &format!("CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'"));
        Arc::new(cluster)
    }

    /// Runs `pg_ctl` with these arguments, such as `restart --mode=immediate`.
    pub fn pg_ctl(&self, arguments: &[&str]) {
        let mut command = as_postgres(self.binaries.join("pg_ctl"));
        command
            .arg("--pgdata")
            .arg(self.folder.join("data"))
            .arg("--log")
            .arg(self.folder.join("server.log"));
        run_checked(
            command
                .arg("--wait")
                .args(arguments)
                .current_dir(&self.folder)
                .stdin(Stdio::null())
                .stdout(Stdio::null()),
        );
    }

    /// Kills one of this role's backends with signal 9.
    pub fn kill_backend(&self, role: &str) {
        let of_role = format!("SELECT pid FROM pg_stat_activity WHERE usename = '{role}' LIMIT 1");
        let pid = self.query("postgres", &of_role);
        run_checked(as_postgres("kill").args(["-9", &pid]));
    }

    /// Returns the port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the CPU time of the server's processes.
    pub fn cpu(&self) -> Duration {
        let first_line = fs::read_to_string(self.folder.join("data/postmaster.pid")).unwrap();
        cpu_with_children(first_line.lines().next().unwrap().parse().unwrap())
    }

    /// Returns the number of this role's connections.
    pub fn connections(&self, role: &str) -> String {
        let of_role = format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{role}'");
        self.query("postgres", &of_role)
    }

    /// Restarts it as a standby without a primary: in permanent recovery and read-only.
    pub fn restart_as_standby(&self) {
        fs::write(self.folder.join("data/standby.signal"), "").unwrap();
        self.pg_ctl(&["restart", "--mode=fast"]);
    }

    fn query(&self, database: &str, query: &str) -> String {
        let mut psql = self.psql(database, query);
        psql.args(["--tuples-only", "--no-align"])
            .stdout(Stdio::piped());
        let text = String::from_utf8(psql.output().unwrap().stdout).unwrap();
        text.trim().to_owned()
    }

    fn execute(&self, database: &str, statements: &str) {
        let output = self.psql(database, statements).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn psql(&self, database: &str, statements: &str) -> Command {
        let mut command = Command::new(self.binaries.join("psql"));
        command
            .args([
                "--no-psqlrc",
                "--quiet",
                "--set=ON_ERROR_STOP=1",
                "--username=owner",
                "--host",
            ])
            .arg(&self.folder)
            .args(["--port", &self.port.to_string()])
            .args(["--dbname", database, "--command", statements])
            .env("PGPASSWORD", PASSWORD)
            .stdout(Stdio::null());
        command
    }
}

/// A database, and a role that may only read its tables.
pub struct Postgres {
    cluster: Arc<Cluster>,
    name: String,
}

impl Postgres {
    /// Creates a database with this schema on the shared cluster.
    pub fn with(schema: &str) -> Self {
        static SHARED: OnceLock<Arc<Cluster>> = OnceLock::new();
        Self::on(SHARED.get_or_init(Cluster::start), schema)
    }

    /// Creates a database with this schema; the role `reader` gets SELECT on its tables.
    pub fn on(cluster: &Arc<Cluster>, schema: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        cluster.execute("postgres", &format!("CREATE DATABASE {name}"));
        cluster.execute(&name, schema);
        cluster.execute(&name, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader");
        Self {
            cluster: Arc::clone(cluster),
            name,
        }
    }

    /// Runs statements as the owner.
    pub fn execute(&self, statements: &str) {
        self.cluster.execute(&self.name, statements);
    }

    /// Runs a query as the owner and returns its single value.
    pub fn query(&self, query: &str) -> String {
        self.cluster.query(&self.name, query)
    }

    /// Waits until the webhook executes so many queries.
    pub fn wait_for_queries(&self, count: u32) {
        let active = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND datname = current_database() AND state = 'active'";
        wait_for("queries are executed", || {
            (self.query(active) == count.to_string()).then_some(())
        });
    }

    /// Returns the read-only role's URL, over the Unix socket.
    pub fn url(&self) -> String {
        self.url_with(PASSWORD)
    }

    /// Returns the read-only role's URL through this port on loopback.
    pub fn url_via(&self, port: u16) -> String {
        format!("postgres://reader:{PASSWORD}@127.0.0.1:{port}/{}", self.name)
    }

    /// Returns the URL over the Unix socket with another password.
    pub fn url_with(&self, password: &str) -> String {
        format!(
            "postgres://reader:{password}@localhost:{}/{}?host={}",
            self.cluster.port,
            self.name,
            self.cluster.folder.display()
        )
    }
}

/// PgBouncer in transaction mode in front of a cluster, with fewer server connections than the webhook opens.
pub struct PgBouncer {
    child: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl PgBouncer {
    /// Starts PgBouncer in front of a cluster.
    pub fn start(cluster: &Cluster) -> Self {
        Self::start_with(cluster, "")
    }

    /// Starts PgBouncer with further settings, one per line.
    pub fn start_with(cluster: &Cluster, further: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let port = free_port();
        let settings = format!(
            "[databases]
             * = host={}  port={}
             [pgbouncer]
             listen_addr = 127.0.0.1
             listen_port = {port}
             unix_socket_dir =
             auth_type = scram-sha-256
             auth_file = {}
             pool_mode = transaction
             default_pool_size = 4
             {further}
             ",
            cluster.folder.display(),
            cluster.port,
            path("users").display(),
        );
        fs::write(path("users"), format!("\"reader\" \"{PASSWORD}\"\n")).unwrap();
        fs::write(path("pgbouncer.ini"), settings.replace("\n             ", "\n")).unwrap();
        for name in ["users", "pgbouncer.ini", ""] {
            restrict_to_postgres(&path(name));
        }
        let mut command = as_postgres("pgbouncer");
        let child = command
            .args(["--quiet", "pgbouncer.ini"])
            .current_dir(folder.path())
            .spawn()
            .unwrap();
        wait_for("PgBouncer listens", || TcpStream::connect(("127.0.0.1", port)).ok());
        Self {
            child,
            port,
            _folder: folder,
        }
    }

    /// Returns the port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the CPU time that it has used.
    pub fn cpu(&self) -> Duration {
        cpu_of(self.child.id())
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        // Both fail only if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// Makes a file or folder accessible to the server alone.
fn restrict_to_postgres(path: &Path) {
    let mode = if path.is_dir() { "0700" } else { "0600" };
    run_checked(Command::new("chmod").arg(mode).arg(path));
    if is_root() {
        run_checked(Command::new("chown").arg("postgres").arg(path));
    }
}

fn run_checked(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}");
}

/// Returns a command that runs as `postgres`: PostgreSQL refuses to run as root.
fn as_postgres(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
        .arg(program);
    command
}

/// Returns a free port on loopback. It is below the ephemeral range, so it stays free while its server restarts.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(20_000 + next % 10_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Returns the folder of PostgreSQL's programs. Debian has one per version, and none of them is on the PATH.
fn binaries() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut folders: Vec<PathBuf> = versions
        .filter_map(Result::ok)
        .map(|version| version.path().join("bin"))
        .collect();
    folders.extend(
        std::env::var_os("PATH")
            .iter()
            .flat_map(std::env::split_paths),
    );
    let has_server = |folder: &PathBuf| {
        ["initdb", "pg_ctl", "psql"]
            .iter()
            .all(|name| Path::is_file(&folder.join(name)))
    };
    folders
        .into_iter()
        .find(has_server)
        .expect("PostgreSQL is not installed; scripts/check installs it")
}
