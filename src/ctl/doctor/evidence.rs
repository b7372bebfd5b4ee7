//! Whether the helper makes evidence of the host: asked for some, over zeros.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::finding::{Check, Finding};
use super::host::{DEADLINE, Host};
use crate::attest::host::helper::SOCKET;
use crate::attest::host::{HelperAttester, HostError, HostEvidence, HostProvider};

const WHY: &str = "no evidence can be made without the helper: peers that verify are refused";

/// One helper, asked for what one provider makes.
pub(super) fn check(host: &dyn Host, socket: &Path, provider: HostProvider) -> Finding {
    let shown = socket.display();
    let start = if socket == Path::new(SOCKET) {
        "systemctl enable --now tng-evidence.socket".to_owned()
    } else {
        format!("correct evidence_addr, or remove it: then it is {SOCKET}")
    };
    let broken = |what: String| Finding::error(Check::EvidenceHelper, what).why(WHY);
    let path = host.path(&socket.to_string_lossy());
    match std::fs::metadata(&path).map(|m| m.file_type().is_socket()) {
        Ok(true) => {}
        Ok(false) => return broken(format!("{shown} is not a socket")).fix(start),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied && !host.is_root() => {
            return Finding::needs_root(Check::EvidenceHelper);
        }
        Err(e) => return broken(format!("{shown}: {e}")).fix(start),
    }
    match ask(&path, provider) {
        Ok(made) => Finding::ok(Check::EvidenceHelper, format!("{shown} makes evidence of TEE {}", made.tee)),
        // Root may connect to every socket.
        Err(HostError::HelperUnreachable(_)) if !host.is_root() => Finding::needs_root(Check::EvidenceHelper),
        Err(e) => {
            let what = format!("{shown}: {e} [{}]", e.reason());
            let fix = match &e {
                HostError::HelperUnreachable(_) => start,
                HostError::TsmAbsent(_) => "modprobe -a tdx_guest sev-guest; ls /sys/kernel/config/tsm/report".into(),
                HostError::TpmUnreachable(_) => "ls -l /dev/tpm*; dmesg | grep -i tpm".into(),
                _ => "journalctl -u 'tng-evidence@*' -n 20".into(),
            };
            broken(what).fix(fix)
        }
    }
}

fn ask(socket: &Path, provider: HostProvider) -> Result<HostEvidence, HostError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|_| HostError::Internal)?;
    runtime.block_on(HelperAttester::new(socket, provider, DEADLINE).ask(&[0; 64]))
}
