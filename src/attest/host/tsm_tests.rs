//! The real file code runs over a real directory; what the kernel does at each step is done here between the steps. Not
//! covered, because no kernel here has it: that configfs commits a write on close, reads in pieces, and refuses what is
//! not root's.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use super::super::{HelperAttester, HostProvider, helper};
use super::*;
use crate::attest::{Attester, RuntimeData};

const DATA: [u8; 64] = [0x5a; 64];

/// What a stranger with root's rights does, and when.
#[derive(Clone, Copy, PartialEq)]
enum Stranger {
    Away,
    /// Writes to our entry after we did, this often.
    Writes(u32),
    /// Holds the entry: our write is lost when the file is closed.
    Holds,
}

/// Makes the report over what was written.
type Reporter = Box<dyn Fn(&[u8]) -> Vec<u8> + Send>;

struct Kernel {
    files: ConfigFs,
    root: tempfile::TempDir,
    provider: &'static str,
    report: Reporter,
    aux: Vec<u8>,
    stranger: Cell<Stranger>,
    made: RefCell<Vec<String>>,
}

fn kernel(provider: &'static str, report: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> Kernel {
    let root = tempfile::tempdir().unwrap();
    Kernel {
        files: ConfigFs::new(root.path()),
        root,
        provider,
        report: Box::new(report),
        aux: Vec::new(),
        stranger: Cell::new(Stranger::Away),
        made: RefCell::default(),
    }
}

impl Kernel {
    fn path(&self, entry: &str, attribute: &str) -> PathBuf {
        self.root.path().join(entry).join(attribute)
    }
    fn set(&self, entry: &str, attribute: &str, value: &[u8]) {
        std::fs::write(self.path(entry, attribute), value).unwrap();
    }
    fn count(&self, entry: &str) {
        let file = self.path(entry, "generation");
        let generation: u64 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        std::fs::write(file, format!("{}\n", generation + 1)).unwrap();
    }
    fn entries(&self) -> usize {
        std::fs::read_dir(self.root.path()).unwrap().count()
    }
    fn evidence(&self) -> Result<serde_json::Value, &'static str> {
        let made = evidence(self, &DATA);
        assert_eq!(self.entries(), 0, "an entry is left");
        made.map(|m| serde_json::from_str(&m.evidence).unwrap()).map_err(|e| e.reason())
    }
}

impl ReportFs for Kernel {
    fn make(&self, entry: &str) -> io::Result<()> {
        if self.provider.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        self.files.make(entry)?;
        for attribute in ["inblob", "outblob", "auxblob"] {
            self.set(entry, attribute, b"");
        }
        self.set(entry, "provider", self.provider.as_bytes());
        self.set(entry, "generation", b"0\n");
        self.made.borrow_mut().push(entry.to_owned());
        Ok(())
    }

    fn write(&self, entry: &str, attribute: &str, value: &[u8]) -> io::Result<()> {
        self.files.write(entry, attribute, value)?;
        match self.stranger.get() {
            Stranger::Holds => {
                self.set(entry, "inblob", b"");
                return Ok(());
            }
            Stranger::Writes(times) if times > 0 => {
                self.stranger.set(Stranger::Writes(times - 1));
                self.count(entry);
                self.set(entry, "inblob", &[1; 64]);
            }
            _ => {}
        }
        self.count(entry);
        Ok(())
    }

    fn read(&self, entry: &str, attribute: &str, limit: usize) -> io::Result<Vec<u8>> {
        // Made when it is first read, of what was written last.
        if attribute == "outblob" {
            let inblob = std::fs::read(self.path(entry, "inblob")).unwrap();
            if inblob.is_empty() {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            self.set(entry, "outblob", &(self.report)(&inblob));
            self.set(entry, "auxblob", &self.aux);
        }
        self.files.read(entry, attribute, limit)
    }

    fn remove(&self, entry: &str) -> io::Result<()> {
        for attribute in ["inblob", "outblob", "auxblob", "provider", "generation"] {
            std::fs::remove_file(self.path(entry, attribute)).unwrap();
        }
        self.files.remove(entry)
    }

    fn root(&self) -> String {
        self.files.root()
    }
}

/// A TDX quote of this version over `data`.
fn tdx(version: u8, data: &[u8]) -> Vec<u8> {
    let mut quote = vec![0; 700];
    quote[0] = version;
    let at = if version == 5 { 54 } else { 48 } + 520;
    quote[at..at + data.len()].copy_from_slice(data);
    quote
}

#[test]
fn tdx_quotes_become_evidence() {
    for version in [4, 5] {
        let kernel = kernel("tdx_guest\n", move |data| tdx(version, data));
        let evidence = kernel.evidence().unwrap();
        assert_eq!(evidence["quote"], BASE64_STANDARD.encode(tdx(version, &DATA)));
        assert!(evidence["cc_eventlog"].is_null());
        assert_eq!(kernel.made.borrow().len(), 1);
    }
    assert_eq!(kernel("tdx_guest\n", |data| tdx(3, data)).evidence(), Err("tsm-report"));
    assert_eq!(kernel("tdx_guest\n", |data| tdx(4, data)[..600].to_vec()).evidence(), Err("tsm-report"));
    assert_eq!(kernel("tdx_guest\n", |_| tdx(4, &[1; 64])).evidence(), Err("tsm-report"));
    assert_eq!(kernel("tdx_guest\n", |_| Vec::new()).evidence(), Err("tsm-report"));
    assert_eq!(kernel("tdx_guest\n", |_| vec![0; MAX_BLOB + 1]).evidence(), Err("tsm-failed"));
}

#[test]
fn snp_reports_become_evidence_and_other_providers_do_not() {
    let report = |data: &[u8]| {
        let mut report = vec![0; 0x4a0];
        report[0] = 3;
        report[0x50..0x90].copy_from_slice(data);
        report
    };
    let evidence = kernel("sev_guest\n", report).evidence().unwrap();
    assert_eq!(evidence["attestation_report"]["report_data"][63], 0x5a);
    assert_eq!(kernel("sev_guest\n", |_| vec![0; 0x4a0]).evidence(), Err("tsm-report"));
    assert_eq!(kernel("arm_cca_guest\n", |data| data.to_vec()).evidence(), Err("tsm-provider"));
}

#[test]
fn what_is_not_there_is_absent() {
    assert_eq!(kernel("", |_| Vec::new()).evidence(), Err("tsm-absent"));
    let nowhere = evidence(&ConfigFs::new(Path::new("/nonexistent/tsm")), &DATA).unwrap_err();
    assert_eq!(nowhere.reason(), "tsm-absent");
    // A directory that is no configfs: no attributes appear, and nothing is left in it.
    let plain = tempfile::tempdir().unwrap();
    assert_eq!(evidence(&ConfigFs::new(plain.path()), &DATA).unwrap_err().reason(), "tsm-failed");
    assert_eq!(std::fs::read_dir(plain.path()).unwrap().count(), 0);
}

#[test]
fn a_report_that_somebody_else_wrote_to_is_thrown_away_and_asked_for_anew() {
    // Were the generation not looked at, the report over the stranger's data would come.
    let kernel = kernel("tdx_guest\n", |data| tdx(4, data));
    kernel.stranger.set(Stranger::Writes(2));
    assert_eq!(kernel.evidence().unwrap()["quote"], BASE64_STANDARD.encode(tdx(4, &DATA)));
    assert_eq!(kernel.made.borrow().len(), 3);
    let mut names = kernel.made.borrow().clone();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 3, "each try has an entry of its own");

    kernel.stranger.set(Stranger::Writes(u32::MAX));
    assert_eq!(kernel.evidence(), Err("tsm-contended"));
}

#[test]
fn a_write_that_was_not_taken_over_gives_no_report() {
    let kernel = kernel("tdx_guest\n", |data| tdx(4, data));
    kernel.stranger.set(Stranger::Holds);
    assert!(kernel.evidence().is_err());
}

#[tokio::test]
async fn the_data_plane_gets_a_report_over_its_key_through_the_helper() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("evidence.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let kernel = kernel("tdx_guest\n", |data| tdx(4, data));
    let root = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        helper::serve(&mut stream, |provider, data| {
            assert_eq!(provider, HostProvider::Tsm);
            evidence(&kernel, data)
        })
    });
    let runtime_data = RuntimeData::for_key(b"key");
    let attester = HelperAttester::new(&socket, HostProvider::Tsm, Duration::from_secs(10));
    let made = attester.evidence(&runtime_data).await.unwrap();
    root.join().unwrap().unwrap();
    // 48 bytes of digest and 16 of zero, as CoCo's service compares them.
    let mut data = runtime_data.digest().to_vec();
    data.resize(64, 0);
    let json: serde_json::Value = serde_json::from_slice(&made.evidence).unwrap();
    assert_eq!((made.tee.as_str(), &json["quote"]), ("tdx", &BASE64_STANDARD.encode(tdx(4, &data)).into()));
    assert_eq!((made.runtime_data.as_str(), attester.calls()), (runtime_data.canonical(), 1));
}
