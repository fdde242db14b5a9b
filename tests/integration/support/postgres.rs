//! A real PostgreSQL for the tests: one cluster for the run, one database for each test. It listens on a
//! Unix socket in a temporary folder, and ends with the test process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::program::wait_for;

/// The password of the databases' owner.
pub(crate) const PASSWORD: &str = "correct-horse-battery-staple";

struct Cluster {
    binaries: PathBuf,
    folder: PathBuf,
    /// Ends the server when this process closes its end of the pipe, however it ends.
    _keeper: Child,
}

/// A database of its own, and a role that may only do what `grants` say.
pub(crate) struct Postgres {
    name: String,
}

impl Postgres {
    /// Makes a database with this schema; the role `reader` gets SELECT on its tables.
    pub(crate) fn with(schema: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        psql("postgres", &format!("CREATE DATABASE {name}"));
        psql(&name, schema);
        psql(
            &name,
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader",
        );
        Self { name }
    }

    /// Runs statements as the owner.
    pub(crate) fn execute(&self, statements: &str) {
        psql(&self.name, statements);
    }

    /// The URL for the role that may only read.
    pub(crate) fn url(&self) -> String {
        self.url_with(PASSWORD)
    }

    /// The same with another password.
    pub(crate) fn url_with(&self, password: &str) -> String {
        format!(
            "postgres://reader:{password}@localhost/{}?host={}",
            self.name,
            cluster().folder.display()
        )
    }
}

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(start)
}

fn start() -> Cluster {
    let binaries = binaries();
    let folder = tempfile::Builder::new()
        .prefix("pg-")
        .tempdir()
        .unwrap()
        .keep();
    let is_root =
        fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if is_root {
        assert!(
            Command::new("chown")
                .arg("postgres")
                .arg(&folder)
                .status()
                .unwrap()
                .success()
        );
    }
    // PostgreSQL refuses to run as root.
    let script = r#"
        set -eu
        printf %s "$3" > "$2/password"
        "$1/initdb" --pgdata="$2/data" --username=owner --auth=scram-sha-256 --pwfile="$2/password" \
            --no-sync --encoding=UTF8 --locale=C > "$2/initdb.log" 2>&1
        "$1/postgres" -D "$2/data" -k "$2" -c listen_addresses= -c fsync=off -c max_connections=300 > "$2/server.log" 2>&1 &
        server=$!
        cat > /dev/null
        kill -s INT "$server"
        wait "$server" || true
        cd /
        rm -rf "$2"
    "#;
    let mut keeper = if is_root {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=postgres",
            "--regid=postgres",
            "--clear-groups",
            "sh",
        ]);
        command
    } else {
        Command::new("sh")
    };
    let keeper = keeper
        .args(["-c", script, "keeper"])
        .args([binaries.as_os_str(), folder.as_os_str()])
        .arg(PASSWORD)
        .current_dir(&folder)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let cluster = Cluster {
        binaries,
        folder,
        _keeper: keeper,
    };
    wait_for("PostgreSQL answers", || {
        let answer = command(&cluster, "postgres", "SELECT 1").output().unwrap();
        answer.status.success().then_some(())
    });
    let role = format!("CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'");
    assert!(
        command(&cluster, "postgres", &role)
            .status()
            .unwrap()
            .success()
    );
    cluster
}

fn psql(database: &str, statements: &str) {
    let done = command(cluster(), database, statements).output().unwrap();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
}

fn command(cluster: &Cluster, database: &str, statements: &str) -> Command {
    let mut command = Command::new(cluster.binaries.join("psql"));
    command
        .args([
            "--no-psqlrc",
            "--quiet",
            "--set=ON_ERROR_STOP=1",
            "--username=owner",
            "--host",
        ])
        .arg(&cluster.folder)
        .args(["--dbname", database, "--command", statements])
        .env("PGPASSWORD", PASSWORD)
        .stdout(Stdio::null());
    command
}

/// Debian keeps the server's programs off the PATH, in a folder a version.
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
        ["initdb", "postgres", "psql"]
            .iter()
            .all(|name| Path::is_file(&folder.join(name)))
    };
    folders
        .into_iter()
        .find(has_server)
        .expect("PostgreSQL is not installed; scripts/check installs it")
}
