//! Debian's swtpm: a real TPM 2.0 implementation (libtpms) behind a unix socket, with a seed of its own in each test.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tng::attest::tpm::quote::{AttestationKey, TpmSettings};
use tng::attest::tpm::transport::{Connection, TpmAddress, Transport};

/// A running TPM.
pub struct Swtpm {
    child: Child,
    pub socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Swtpm {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let socket = dir.path().join("tpm.sock");
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .args(["--tpmstate", &format!("dir={}", dir.path().display())])
            .args(["--server", &format!("type=unixio,path={}", socket.display())])
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("swtpm: {e}; run: packaging/install-packages swtpm"));
        let mut tpm = Self { child, socket, _dir: dir };
        let end = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(&tpm.socket).is_err() {
            assert!(Instant::now() < end, "swtpm does not listen");
            assert!(tpm.child.try_wait().expect("wait").is_none(), "swtpm ended");
            std::thread::yield_now();
        }
        tpm
    }

    pub fn settings(&self, key: AttestationKey) -> TpmSettings {
        TpmSettings { address: TpmAddress::Socket(self.socket.clone()), key, ..TpmSettings::default() }
    }

    /// Runs a bare command, which has to succeed; returns what follows the response's header.
    pub fn run(&self, command: &[u8]) -> Vec<u8> {
        let mut connection =
            Connection::open(&TpmAddress::Socket(self.socket.clone()), Duration::from_secs(10)).expect("swtpm");
        let response = connection.exchange(command).expect("response");
        assert_eq!(response[6..10], [0; 4], "{response:02x?}");
        response[10..].to_vec()
    }

    /// TPM2_PCR_Extend of one SHA-256 bank.
    pub fn extend(&self, pcr: u8, digest: [u8; 32]) {
        let mut body = vec![0, 0, 0, pcr];
        body.extend(PASSWORD_SESSION);
        // TPML_DIGEST_VALUES of one TPMT_HA.
        body.extend([0, 0, 0, 1, 0, 0x0b]);
        body.extend(digest);
        self.run(&command(0x182, &body));
    }

    /// TPM2_EvictControl: makes the key behind a transient handle persistent.
    pub fn persist(&self, transient: u32, persistent: u32) {
        let mut body = 0x4000_0001u32.to_be_bytes().to_vec();
        body.extend(transient.to_be_bytes());
        body.extend(PASSWORD_SESSION);
        body.extend(persistent.to_be_bytes());
        self.run(&command(0x120, &body));
    }
}

const PASSWORD_SESSION: [u8; 13] = [0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0];

fn command(code: u32, body: &[u8]) -> Vec<u8> {
    let mut out = vec![0x80, 0x02];
    out.extend((body.len() as u32 + 10).to_be_bytes());
    out.extend(code.to_be_bytes());
    out.extend(body);
    out
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
