//! Kernel settings that break or weaken tng. Few do: rp_filter 0, 1 and 2, route_localnet = 1, tcp_loose = 0,
//! fwmark_reflect = 1 and notrack were run against the rules and change nothing, and the listeners need neither ip_nonlocal_bind (they are
//! transparent) nor a value of bindv6only (the socket unit says ipv6-only), so none of these is looked at.

use super::finding::{Check, Finding};
use super::host::Host;
use super::instance::Wants;

/// Backlog of the listeners (`Backlog=4096`): how many connections wait while the daemon restarts.
const BACKLOG: u64 = 4096;

/// All settings. `wants`: what the configurations need.
pub(super) fn check(host: &dyn Host, wants: &Wants) -> Vec<Finding> {
    let mut found = vec![ipv6(host, wants.captures)];
    found.push(fwmark_accept(host.sysctl("net/ipv4/tcp_fwmark_accept"), wants.captures));
    if let Some(finding) = somaxconn(host.sysctl("net/core/somaxconn")) {
        found.push(finding);
    }
    let table = (host.sysctl("net/netfilter/nf_conntrack_count"), host.sysctl("net/netfilter/nf_conntrack_max"));
    if let (Some(count), Some(max)) = table {
        found.push(conntrack(count, max));
    }
    found.extend(host.sysctl("kernel/yama/ptrace_scope").map(ptrace));
    found
}

/// Run: with disable_ipv6 = 1 on lo, `ip -6 route add local default dev lo` is refused ("IPv6 is disabled on nexthop
/// device"), and with it `net up`. A kernel without IPv6 has no /proc/net/if_inet6 and needs no such route.
fn ipv6(host: &dyn Host, captures: bool) -> Finding {
    let check = Check::Ipv6OnLo;
    if !host.exists("/proc/net/if_inet6") {
        return Finding::ok(check, "the kernel has no IPv6, rules and routes are IPv4 only");
    }
    if host.sysctl("net/ipv6/conf/lo/disable_ipv6") != Some(1) {
        return Finding::ok(check, "IPv6 is on for lo");
    }
    let what = "net.ipv6.conf.lo.disable_ipv6 is 1";
    let finding = if captures { Finding::error(check, what) } else { Finding::note(check, what) };
    finding
        .why("captured IPv6 goes around by lo; without it the routes cannot be made and no capture starts")
        .fix("echo net.ipv6.conf.lo.disable_ipv6=0 >/etc/sysctl.d/90-tng.conf && sysctl -p /etc/sysctl.d/90-tng.conf")
}

/// Run, on the ingress's host and on the egress's, IPv4 and IPv6: the accepted socket gets the mark of the SYN, "captured"
/// or "handed over by tproxy", in the place of the listener's own, and the protecting chains refuse its packets.
fn fwmark_accept(value: Option<u64>, captures: bool) -> Finding {
    let check = Check::FwmarkAccept;
    if value.is_none_or(|v| v == 0) {
        return Finding::ok(check, "accepted sockets keep the listener's mark");
    }
    let what = "net.ipv4.tcp_fwmark_accept is on";
    let finding = if captures { Finding::error(check, what) } else { Finding::note(check, what) };
    finding
        .why("accepted sockets lose the mark by which their packets are let through: every captured connection is refused")
        .fix("echo net.ipv4.tcp_fwmark_accept=0 >/etc/sysctl.d/94-tng.conf && sysctl -p /etc/sysctl.d/94-tng.conf")
}

fn somaxconn(value: Option<u64>) -> Option<Finding> {
    let (check, value) = (Check::Somaxconn, value?);
    Some(if value >= BACKLOG {
        Finding::ok(check, format!("net.core.somaxconn is {value}"))
    } else {
        Finding::warning(check, format!("net.core.somaxconn is {value}, below {BACKLOG}"))
            .why("it cuts the queue in which connections wait while the daemon restarts; what does not fit is lost")
            .fix(format!(
                "echo net.core.somaxconn={BACKLOG} >/etc/sysctl.d/91-tng.conf && sysctl -p /etc/sysctl.d/91-tng.conf"
            ))
    })
}

fn conntrack(count: u64, max: u64) -> Finding {
    let check = Check::ConntrackTable;
    let what = format!("{count} of {max} tracked connections");
    let double = max.max(131_072) * 2;
    let fix = format!(
        "echo net.netfilter.nf_conntrack_max={double} >/etc/sysctl.d/92-tng.conf && sysctl -p /etc/sysctl.d/92-tng.conf"
    );
    let why = "a full table drops new connections, captured ones among them; each tunnel takes up to three entries";
    if count >= max {
        Finding::error(check, format!("{what}: the table is full")).why(why).fix(fix)
    } else if count >= max - max / 10 {
        Finding::warning(check, what).why(why).fix(fix)
    } else {
        Finding::ok(check, what)
    }
}

/// The guard copies the netlink socket of its nft by pidfd_getfd(2), which asks for ptrace access. The guard's unit has
/// CAP_NET_ADMIN alone: 0 and 1 (its own child) allow that, 2 wants CAP_SYS_PTRACE, 3 allows nobody (Yama.rst).
fn ptrace(scope: u64) -> Finding {
    let check = Check::Ptrace;
    if scope <= 1 {
        return Finding::ok(check, format!("kernel.yama.ptrace_scope is {scope}"));
    }
    let finding = Finding::warning(check, format!("kernel.yama.ptrace_scope is {scope}")).why(
        "the guard keeps no copy of its table's socket then: its table goes with its process, until the next start",
    );
    let permanent = "echo kernel.yama.ptrace_scope=1 >/etc/sysctl.d/93-tng.conf";
    match scope {
        2 => finding.fix(format!("{permanent} && sysctl -p /etc/sysctl.d/93-tng.conf")),
        // 3 can be left by a reboot only.
        _ => finding.fix(format!("{permanent} && systemctl reboot")),
    }
}
