//! Running nft(8): text in on standard input, errors out on standard error.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Overrides the nft program.
pub const NFT_ENV: &str = "TNG_NFT";
/// The longest any nft command may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// Why nft did not do it.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// There is no nft.
    #[error("{}: not found; install it: apt install nftables", .0.display())]
    Missing(PathBuf),
    /// nft could not be run.
    #[error("cannot run nft: {0}")]
    Run(#[from] io::Error),
    /// nft or the kernel refused; nothing was changed.
    #[error("nft refused the ruleset, nothing was changed: {0}")]
    Refused(String),
    /// nft did not end in time.
    #[error("nft did not end within {} s", DEADLINE.as_secs())]
    Timeout,
}

impl NftError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            NftError::Missing(_) => "nft-missing",
            NftError::Run(_) => "nft-not-run",
            NftError::Refused(_) => "nft-refused",
            NftError::Timeout => "nft-timeout",
        }
    }
    /// Whether the named table does not exist.
    pub fn is_absent(&self) -> bool {
        matches!(self, NftError::Refused(text) if text.contains("No such file or directory"))
    }
}

/// The nft program: `$TNG_NFT`, or the first of `$PATH` and Debian's place for it.
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os(NFT_ENV) {
        return path.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("nft"))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| PathBuf::from("/usr/sbin/nft"))
}

/// Applies `text` in one transaction.
pub fn apply(text: &str) -> Result<(), NftError> {
    run(&["-f", "-"], Some(text)).map(drop)
}

/// Lists a table without its counters' values and without what its rules remember, the way it is compared for drift.
pub fn list_stateless(table: &str) -> Result<String, NftError> {
    run(&["-s", "list", "table", "inet", table], None).map(|text| without_remembered(&text))
}

/// A listing without the elements of sets that rules fill (`flags dynamic`).
fn without_remembered(listing: &str) -> String {
    let mut out = String::with_capacity(listing.len());
    let (mut dynamic, mut elements) = (false, false);
    for line in listing.split_inclusive('\n') {
        let word = line.trim();
        if word.starts_with("set ") {
            dynamic = false;
        } else if word.starts_with("flags ") {
            dynamic = word.contains("dynamic");
        } else if dynamic && word.starts_with("elements = {") {
            elements = true;
        }
        if !elements {
            out.push_str(line);
        }
        // nft breaks a long list into lines; no element holds a brace.
        elements &= !word.ends_with('}');
    }
    out
}

/// Lists a table as JSON.
pub fn list_json(table: &str) -> Result<String, NftError> {
    run(&["-j", "list", "table", "inet", table], None)
}

/// Names of all inet tables.
pub fn inet_tables() -> Result<Vec<String>, NftError> {
    let text = run(&["list", "tables", "inet"], None)?;
    Ok(text.lines().filter_map(|l| l.strip_prefix("table inet ")).map(str::to_owned).collect())
}

/// An error for a program that could not be started.
pub fn spawn_error(program: PathBuf, e: io::Error) -> NftError {
    if e.kind() == io::ErrorKind::NotFound { NftError::Missing(program) } else { NftError::Run(e) }
}

fn run(args: &[&str], input: Option<&str>) -> Result<String, NftError> {
    let program = program();
    let mut child = Command::new(&program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| spawn_error(program, e))?;
    // Each pipe has its own thread: a listing or an error message longer than the pipe must not stop nft.
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    if let (Some(mut stdin), Some(text)) = (child.stdin.take(), input) {
        // A broken pipe means nft ended early; its own message says why.
        let _ = stdin.write_all(text.as_bytes());
    }
    let status = wait(&mut child)?;
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    if status.success() { Ok(stdout) } else { Err(NftError::Refused(stderr.trim().to_owned())) }
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait(child: &mut Child) -> Result<std::process::ExitStatus, NftError> {
    let end = Instant::now() + DEADLINE;
    let mut pause = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= end {
            let _ = child.kill();
            let _ = child.wait();
            return Err(NftError::Timeout);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rules_remember_is_no_drift_and_what_a_stranger_adds_is() {
        let table = |stuck: &str, ports: &str| {
            format!(
                "table inet t {{\n\tset a {{\n\t\tflags interval\n\t\telements = {{ {ports} }}\n\t}}\n\n\tset stuck4 {{\n\t\t\
                 size 4096\n\t\tflags dynamic,timeout\n\t\ttimeout 4s\n{stuck}\t}}\n\n\tset b {{\n\t\tflags interval\n\t\t\
                 elements = {{ 1,\n\t\t\t     2 }}\n\t}}\n\tchain c {{\n\t}}\n}}\n"
            )
        };
        let plain = table("", "80");
        let one = "\t\telements = { 192.0.2.1 . 1 . 192.0.2.2 . 80 }\n";
        let two = "\t\telements = { 192.0.2.1 . 1 . 192.0.2.2 . 80,\n\t\t\t     192.0.2.1 . 2 . 192.0.2.2 . 80 }\n";
        assert_eq!(without_remembered(&plain), plain);
        assert_eq!(without_remembered(&table(one, "80")), plain);
        assert_eq!(without_remembered(&table(two, "80")), plain);
        assert_ne!(without_remembered(&table(one, "80, 81")), plain);
    }
}
