//! Where evidence comes from and who appraises it.

use std::collections::BTreeSet;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use super::agent::AgentError;
use super::finding::{Check, Finding};
use super::host::Host;
use super::instance::Instance;
use super::units::Units;
use super::{builtin, evidence};
use crate::attest::TOKEN_LEEWAY;
use crate::config::{AsService, AttestProvider, Verify, VerifyProvider};

/// Where the packaged proxy listens (`tng-aa-proxy.socket`).
pub const PROXY_SOCKET: &str = "/run/tng/aa.sock";

/// What shows that this machine is, or has, a TEE.
const DEVICES: [&str; 6] = [
    "/dev/tdx_guest",
    "/dev/tdx-guest",
    "/dev/sev-guest",
    "/dev/csv-guest",
    "/sys/kernel/config/tsm/report",
    "/dev/tpmrm0",
];
/// Flags of /proc/cpuinfo in a guest with a TEE.
const CPU_FLAGS: [&str; 2] = ["tdx_guest", "sev_snp"];

const NO_VERDICT: &str = "no peer can be appraised: connections that verify are refused";

/// Agents and services of one instance, each once.
pub(super) fn check(host: &dyn Host, instance: &Instance, units: &Units) -> Vec<Finding> {
    let Ok(config) = &instance.config else { return Vec::new() };
    let mut found = Vec::new();
    let (mut sockets, mut helpers, mut services) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut samples = Vec::new();
    let mut has_agent = false;
    for endpoint in &config.endpoints {
        match endpoint.ra.attest.as_ref().map(|a| &a.provider) {
            Some(AttestProvider::Aa { socket }) if sockets.insert(socket.clone()) => {
                found.extend(agent(host, socket, &instance.name, units));
            }
            Some(AttestProvider::Helper { socket, provider }) if helpers.insert((socket.clone(), provider.name())) => {
                found.push(evidence::check(host, socket, *provider));
            }
            Some(AttestProvider::Asr { addr }) if services.insert(addr.to_string()) => {
                has_agent = true;
                found.extend(api_server(host, addr, &instance.name));
            }
            Some(AttestProvider::Sample) => samples.push(format!("{} shows", endpoint.name)),
            _ => {}
        }
        // Its anchors do not matter to this host, its answer does.
        if let Some(passport) = endpoint.ra.attest.as_ref().and_then(|a| a.passport.as_ref()) {
            let why = "this side has no token to show: peers refuse it";
            found.extend(each(host, &passport.as_verify(), &passport.service, why, &mut services));
        }
        let Some(verify) = &endpoint.ra.verify else { continue };
        if verify.allow_sample || matches!(verify.provider, VerifyProvider::Sample) {
            samples.push(format!("{} accepts", endpoint.name));
        }
        match &verify.provider {
            VerifyProvider::As(all) => found.extend(each(host, verify, all, NO_VERDICT, &mut services)),
            VerifyProvider::Builtin(config) => found.extend(builtin::check(host, config, units.user())),
            VerifyProvider::Anchors(_) | VerifyProvider::Sample => {}
        }
    }
    if has_agent || !sockets.is_empty() {
        found.push(tee(host));
    }
    if !samples.is_empty() {
        found.push(
            Finding::warning(Check::SampleEvidence, format!("sample evidence: endpoint {} it", samples.join(" it, ")))
                .why("it proves nothing: anybody can make it")
                .fix(format!("grep -n sample {}  # use an agent and a service instead", instance.file.display())),
        );
    }
    found.into_iter().map(|f| f.of(&instance.name)).collect()
}

fn agent(host: &dyn Host, socket: &Path, name: &str, units: &Units) -> Vec<Finding> {
    let shown = socket.display();
    let proxied = shown.to_string() == PROXY_SOCKET;
    let start = if proxied {
        "systemctl enable --now tng-aa-proxy.socket".to_owned()
    } else {
        format!("systemctl restart attestation-agent  # or correct aa_addr of {name}")
    };
    let why = "no evidence can be made without the agent: peers that verify are refused";
    let is_socket = std::fs::metadata(host.path(&socket.to_string_lossy())).map(|m| m.file_type().is_socket());
    match is_socket {
        Ok(true) => {}
        Ok(false) => {
            return vec![Finding::error(Check::AaSocket, format!("{shown} is not a socket")).why(why).fix(start)];
        }
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied && !host.is_root() => {
            return vec![Finding::needs_root(Check::AaSocket)];
        }
        Err(e) => return vec![Finding::error(Check::AaSocket, format!("{shown}: {e}")).why(why).fix(start)],
    }
    let mut found = vec![Finding::ok(Check::AaSocket, format!("{shown} is a socket"))];
    let user = units.user();
    let reachable = Finding::ok(Check::AaAccess, format!("user {user} can connect to {shown}"));
    match host.agent(socket, user, &units.groups()) {
        Ok(tee) => {
            if host.is_root() {
                found.push(reachable);
            }
            found.push(Finding::ok(Check::AaAnswer, format!("the agent answers, its TEE is {tee}")));
            if crate::attest::is_sample_tee(&tee) {
                found.push(
                    Finding::warning(Check::Tee, format!("the agent's TEE is {tee}"))
                        .why("it proves nothing; peers refuse it unless they allow the sample TEE"),
                );
            }
            found.extend(tpm(&tee));
        }
        Err(AgentError::Denied) if !host.is_root() => found.push(Finding::needs_root(Check::AaAccess)),
        Err(AgentError::Denied) => found.push(denied(&shown.to_string(), user, name, proxied)),
        Err(AgentError::Unreachable(error)) => {
            found.push(Finding::error(Check::AaAnswer, format!("{shown}: {error}")).why(why).fix(start));
        }
        Err(AgentError::Answer(error)) => {
            let look = "journalctl -u attestation-agent -u tng-aa-proxy -n 20; systemctl restart attestation-agent";
            found.push(reachable);
            found.push(Finding::error(Check::AaAnswer, error).why(why).fix(look));
        }
        Err(AgentError::NotTried(error)) => {
            found.push(Finding::note(Check::AaAccess, format!("not checked: {error}")));
        }
    }
    found
}

/// What helps an agent that has quotes of a TPM made.
fn tpm(tee: &str) -> Option<Finding> {
    let note = Finding::note(Check::Tee, "the agent's TEE is tpm, whose device it opens anew for each quote")
        .why("a second program at /dev/tpm0 makes quotes fail; /dev/tpmrm0 may be open many times")
        .fix("systemctl edit attestation-agent  # Environment=AA_TPM_DEVICE=/dev/tpmrm0");
    (tee == "tpm").then_some(note)
}

/// The agent behind CoCo's API server.
fn api_server(host: &dyn Host, addr: &url::Url, name: &str) -> Vec<Finding> {
    match host.api_server(addr) {
        Ok(tee) => {
            let mut found = vec![Finding::ok(Check::AaAnswer, format!("{addr} answers, its agent's TEE is {tee}"))];
            if crate::attest::is_sample_tee(&tee) {
                found.push(
                    Finding::warning(Check::Tee, format!("the agent's TEE is {tee}"))
                        .why("it proves nothing; peers refuse it unless they allow the sample TEE"),
                );
            }
            found.extend(tpm(&tee));
            found
        }
        Err(e) => vec![
            Finding::error(Check::AaAnswer, format!("{addr}: {e} [{}]", e.reason()))
                .why("no evidence can be made without the agent: peers that verify are refused")
                .fix(format!("curl -v {addr}info  # start or update api-server-rest, or correct asr_addr of {name}")),
        ],
    }
}

/// The packaged way: the proxy, and the address of it in the configuration.
fn denied(socket: &str, user: &str, name: &str, proxied: bool) -> Finding {
    let fix = if proxied {
        "systemctl restart tng-aa-proxy.socket".to_owned()
    } else {
        format!(
            "systemctl enable --now tng-aa-proxy.socket && \
             sed -i 's|unix://{socket}|unix://{PROXY_SOCKET}|' /etc/tng/{name}.toml && tngctl reload {name}"
        )
    };
    Finding::error(Check::AaAccess, format!("user {user} may not connect to {socket}"))
        .why("the agent makes its socket for root alone, and the data plane does not run as root; see tngd(8), ACCESS TO THE ATTESTATION AGENT")
        .fix(fix)
}

/// The addresses of a service that were not asked yet.
fn each(host: &dyn Host, verify: &Verify, all: &AsService, why: &str, asked: &mut BTreeSet<String>) -> Vec<Finding> {
    let mut found = Vec::new();
    for addr in &all.addrs {
        if asked.insert(addr.to_string()) {
            let one = AsService { addrs: vec![addr.clone()], ..all.clone() };
            found.extend(service(host, verify, &one, addr, why));
        }
    }
    found
}

/// One address of a service.
fn service(host: &dyn Host, verify: &Verify, service: &AsService, addr: &url::Url, why: &str) -> Vec<Finding> {
    let seen = match host.service(verify, service) {
        Ok(seen) => seen,
        Err(e) => {
            let fix =
                format!("curl -v {}  # and correct as_addr, as_type, trusted_certs or the way there", signer_url(addr));
            let finding = Finding::error(Check::AsAnswer, format!("{addr}: {e} [{}]", e.reason()));
            return vec![finding.why(why).fix(fix)];
        }
    };
    let what = format!("{addr} answers over {}; anchors: {}", seen.kind.as_str(), seen.anchors);
    let mut found = vec![Finding::ok(Check::AsAnswer, what)];
    if let Some(date) = seen.date {
        let now = host.now();
        let apart = now.duration_since(date).unwrap_or_else(|e| e.duration());
        // The header has whole seconds.
        let what = format!("its clock and ours differ by {} s", apart.as_secs());
        let leeway = TOKEN_LEEWAY.as_secs();
        found.push(if apart <= TOKEN_LEEWAY / 2 {
            Finding::ok(Check::AsClock, what)
        } else {
            let why = format!("a token may be at most {leeway} s from the future; beyond that every peer is refused");
            let fix = "timedatectl set-ntp true && timedatectl timesync-status  # here, and at the service";
            let is_far = apart > TOKEN_LEEWAY + Duration::from_secs(1);
            let finding =
                if is_far { Finding::error(Check::AsClock, what) } else { Finding::warning(Check::AsClock, what) };
            finding.why(why).fix(fix)
        });
    }
    found
}

fn signer_url(addr: &url::Url) -> String {
    format!("{}/.well-known/jwks.json", addr.as_str().trim_end_matches('/'))
}

fn tee(host: &dyn Host) -> Finding {
    let devices: Vec<&str> = DEVICES.into_iter().filter(|d| host.exists(d)).collect();
    let cpuinfo = host.read("/proc/cpuinfo").unwrap_or_default();
    let words: BTreeSet<&str> =
        cpuinfo.lines().find(|l| l.starts_with("flags")).unwrap_or_default().split_whitespace().collect();
    let flags: Vec<&str> = CPU_FLAGS.into_iter().filter(|f| words.contains(f)).collect();
    if devices.is_empty() && flags.is_empty() {
        return Finding::warning(Check::Tee, "no TEE was found: no device, no flag of the CPU")
            .why("an agent without a TEE gives sample evidence, which peers refuse")
            .fix("dmesg | grep -iE 'tdx|sev|tpm'; modprobe -a tdx_guest sev-guest tsm");
    }
    Finding::ok(Check::Tee, [devices, flags].concat().join(" "))
}
