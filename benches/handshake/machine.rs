//! Where a run took place, and what it ran.

use std::process::Command;

use serde_json::{Value, json};

/// Machine and versions.
pub struct Machine {
    processor: String,
    cores: usize,
    kernel: String,
    compiler: String,
    crates: Vec<(&'static str, String)>,
}

impl Machine {
    /// As the running system and the lock file tell.
    pub fn new() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        // Cargo says which one it used.
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let version = Command::new(rustc).arg("--version").output().ok();
        let compiler = version.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
        Self {
            processor: model.map_or(std::env::consts::ARCH, |(_, name)| name).to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: kernel.trim().to_owned(),
            compiler: compiler.filter(|text| !text.is_empty()).unwrap_or_else(|| "rustc ?".to_owned()),
            crates: ["tng", "rustls", "rustls-webpki", "aws-lc-rs", "tokio"].map(|name| (name, locked(name))).into(),
        }
    }

    /// Two lines for people.
    pub fn print(&self) {
        println!("{} cores of {}, kernel {}", self.cores, self.processor, self.kernel);
        let crates: Vec<String> = self.crates.iter().map(|(name, version)| format!("{name} {version}")).collect();
        println!("{}; {}", self.compiler, crates.join(", "));
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let crates: serde_json::Map<_, _> =
            self.crates.iter().map(|(name, version)| ((*name).to_owned(), json!(version))).collect();
        json!({
            "processor": self.processor,
            "cores": self.cores,
            "kernel": self.kernel,
            "compiler": self.compiler,
            "crates": crates,
        })
    }
}

/// Version of a crate in the lock file this was built from.
fn locked(name: &str) -> String {
    let lock = include_str!("../../Cargo.lock");
    let after = lock.split(&format!("name = \"{name}\"\nversion = \"")).nth(1);
    after.and_then(|rest| rest.split('"').next()).unwrap_or("?").to_owned()
}
