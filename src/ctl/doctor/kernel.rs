//! What the kernel and nft can do. Tried, not looked up: each feature is a tiny table that `nft -c` has the kernel check
//! in a new network namespace, which loads modules and changes nothing.

use super::finding::{Check, Finding};
use super::host::{Host, Ran};
use crate::capture::nft;

/// SO_MARK by CAP_NET_RAW alone (kernel commit 079925cce1d0): the data plane has no other capability.
const KERNEL_FLOOR: (u32, u32) = (5, 17);
/// What Debian 12 ships, and what every golden ruleset is checked with.
const NFT_FLOOR: (u32, u32, u32) = (1, 0, 6);

/// A feature, the rules that need it, and the module and option that bring it.
struct Feature {
    check: Check,
    /// What to name it.
    name: &'static str,
    /// The body of a table.
    body: &'static str,
    module: &'static str,
    option: &'static str,
    why: &'static str,
}

const FEATURES: &[Feature] = &[
    Feature {
        check: Check::NftTproxy,
        name: "tproxy for IPv4",
        body: "chain c { type filter hook prerouting priority mangle; meta l4proto tcp tproxy ip to 127.0.0.1:1 accept; }",
        module: "nft_tproxy",
        option: "CONFIG_NFT_TPROXY",
        why: "captured connections reach the listeners by tproxy",
    },
    Feature {
        check: Check::NftTproxy,
        name: "tproxy for IPv6",
        body: "chain c { type filter hook prerouting priority mangle; meta l4proto tcp tproxy ip6 to [::1]:1 accept; }",
        module: "nf_tproxy_ipv6",
        option: "CONFIG_NF_TPROXY_IPV6",
        why: "captured connections reach the listeners by tproxy, IPv6 as well as IPv4",
    },
    Feature {
        check: Check::NftSocket,
        name: "socket transparent",
        body: "chain c { type filter hook input priority filter; socket transparent 1 accept; }",
        module: "nft_socket",
        option: "CONFIG_NFT_SOCKET",
        why: "the guard lets in what our listeners took by this test, and nothing else",
    },
    Feature {
        check: Check::NftFib,
        name: "fib",
        body: "chain c { type filter hook prerouting priority mangle; fib daddr . iif type local accept; }",
        module: "nft_fib_inet",
        option: "CONFIG_NFT_FIB_INET",
        why: "an egress captures what is addressed to this host, which fib tells",
    },
    Feature {
        check: Check::NftConntrack,
        name: "ct mark",
        body: "chain c { type filter hook prerouting priority mangle; ct state new ct mark set ct mark & 0xffff0000 | 0x601; }",
        module: "nft_ct",
        option: "CONFIG_NFT_CT and CONFIG_NF_CONNTRACK_MARK",
        why: "captured flows are remembered by their connection mark",
    },
    Feature {
        check: Check::NftReject,
        name: "reject with tcp reset",
        body: "chain c { type filter hook prerouting priority mangle; meta l4proto tcp reject with tcp reset; }",
        module: "nft_reject_inet",
        option: "CONFIG_NFT_REJECT_INET",
        why: "without a listener, tproxy falls through: the reject behind it keeps the path closed",
    },
    Feature {
        check: Check::NftNat,
        name: "nat chains",
        body: "chain c { type nat hook prerouting priority dstnat - 10; meta nfproto ipv4 dnat ip to ip daddr; }",
        module: "nft_chain_nat",
        option: "CONFIG_NFT_NAT",
        why: "a pin keeps destination NAT of other software from carrying captured flows past the listener",
    },
    Feature {
        check: Check::NftOwner,
        name: "flags owner",
        body: "flags owner;",
        module: "nf_tables",
        option: "Linux 5.12",
        why: "a foreign `nft flush ruleset` must not remove the guard's table",
    },
    Feature {
        check: Check::NftCgroup,
        name: "socket cgroupv2",
        // nft looks the path up itself: this slice exists wherever systemd runs.
        body: "chain c { type filter hook output priority filter; socket cgroupv2 level 1 \"system.slice\" accept; }",
        module: "nft_socket",
        option: "CONFIG_SOCK_CGROUP_DATA and Linux 5.13",
        why: "captures by cgroup match by it",
    },
];

/// Kernel, nft, and what both can do together. `cgroups`: captures by cgroup are configured.
pub(super) fn check(host: &dyn Host, cgroups: bool) -> Vec<Finding> {
    let release = host.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut found = vec![version(&release)];
    let nft = nft::program();
    let nft = nft.to_string_lossy();
    let program = nft_version(&host.run(&[&nft, "--version"], None));
    let usable = program.severity == super::Severity::Ok;
    found.push(program);
    if !usable {
        return found;
    }
    for feature in FEATURES {
        if feature.check == Check::NftCgroup && !(cgroups && host.exists("/sys/fs/cgroup/cgroup.controllers")) {
            continue; // the cgroup checks say what is missing
        }
        if !host.is_root() {
            found.push(Finding::needs_root(feature.check));
            continue;
        }
        let table = format!("table inet tng-doctor {{\n{}\n}}\n", feature.body);
        let ran = host.run(&["unshare", "--net", "--", &nft, "-c", "-f", "-"], Some(&table));
        found.push(judge(feature, &ran, &release));
    }
    found.dedup(); // both families of tproxy unchecked
    found
}

fn version(release: &str) -> Finding {
    let check = Check::KernelVersion;
    let mut numbers = release.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= KERNEL_FLOOR => Finding::ok(check, format!("Linux {release}")),
        (Some(_), Some(_)) => {
            Finding::error(check, format!("Linux {release} is older than {}.{}", KERNEL_FLOOR.0, KERNEL_FLOOR.1))
                .why("the data plane marks its sockets with CAP_NET_RAW alone, which older kernels refuse")
                .fix("apt install linux-image-amd64 && systemctl reboot")
        }
        _ => Finding::warning(check, format!("the kernel's version cannot be read from \"{release}\"")),
    }
}

fn nft_version(ran: &Ran) -> Finding {
    let check = Check::NftProgram;
    let install = "apt install nftables";
    let why = "rules are loaded by nft(8)";
    let text = match ran {
        Ran::Done { stdout, .. } => stdout.trim(),
        Ran::NotRun(error) => {
            return Finding::error(check, format!("nft cannot be run: {error}")).why(why).fix(install);
        }
        Ran::Timeout => return Finding::error(check, "nft --version does not end").why(why).fix(install),
    };
    let word = text.split_whitespace().find_map(|w| w.strip_prefix('v')).unwrap_or_default();
    let mut numbers = word.split('.').map_while(|n| n.parse::<u32>().ok());
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(a), Some(b), c) if (a, b, c.unwrap_or(0)) >= NFT_FLOOR => Finding::ok(check, text),
        (Some(_), ..) => Finding::error(check, format!("{text} is older than 1.0.6"))
            .why("older versions refuse the rules or list them differently, which would look like drift")
            .fix(install),
        _ => Finding::warning(check, format!("nft's version cannot be read from \"{text}\"")).why(why).fix(install),
    }
}

fn judge(feature: &Feature, ran: &Ran, release: &str) -> Finding {
    match ran {
        Ran::Done { ok: true, .. } => Finding::ok(feature.check, format!("{} works", feature.name)),
        Ran::Done { stderr, .. } if stderr.contains("unshare:") => {
            Finding::note(feature.check, format!("{}: not checked: {}", feature.name, first_line(stderr)))
                .why("the check makes a network namespace of its own, which is not allowed here")
        }
        Ran::Done { stderr, .. } => {
            let what = format!(
                "{} does not work on Linux {release} ({}, module {}): {}",
                feature.name,
                feature.option,
                feature.module,
                first_line(stderr)
            );
            let load = format!("modprobe {0} && echo {0} >>/etc/modules-load.d/tng.conf", feature.module);
            Finding::error(feature.check, what).why(feature.why).fix(load)
        }
        Ran::NotRun(error) => Finding::note(feature.check, format!("{}: not checked: {error}", feature.name)),
        Ran::Timeout => Finding::warning(feature.check, format!("{}: nft did not end", feature.name)).why(feature.why),
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default().trim()
}
