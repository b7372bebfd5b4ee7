//! From a bare Debian to the package, by apt from the signed local repository.

use super::container::Container;
use super::pair::{INGRESS, Pair, marker};

/// Where the container sees the repository.
const REPOSITORY: &str = "/srv/tng-repository";
/// What a system is made of, without what every boot or apt itself makes anew.
const INVENTORY: &str = "
find / \\( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /run -o -path /srv/tng-repository \
    -o -path /var/log -o -path /var/cache -o -path /var/tmp -o -path /var/lib/apt -o -path /var/lib/dpkg \
    -o -path /var/lib/systemd \\) -prune -o -print | sort
find /run/tng /run/systemd/system /run/systemd/generator* -name '*tng*' 2>/dev/null || true
dpkg-query -W -f 'package ${Package} ${Status}\\n'
sed 's/^/passwd /' /etc/passwd; sed 's/^/group /' /etc/group
systemctl list-unit-files --no-legend --no-pager | awk '{print \"unit\", $1, $2}' | sort
nft list ruleset; ip rule; ip -6 rule; ip route show table all; ip -6 route show table 565 2>/dev/null || true
";

/// What apt does to a system for good, whatever it installs.
const APT_TRACES: [&str; 3] = ["/etc/passwd-", "/etc/group-", "/etc/.pwd.lock"];

/// Without tng, what the client asks and the service says is on the wire: the sniffer sees plaintext.
pub fn plaintext_is_visible_without_tng(pair: &Pair) {
    pair.point("without tng the request is on the wire, IPv4 and IPv6 (positive control)", || {
        for (target, family) in pair.targets().iter().zip(["IPv4", "IPv6"]) {
            let word = marker("bare");
            pair.wire.forget();
            let authority = super::pair::authority(&target.0, target.1);
            super::pair::curl(&pair.client, &authority, &word).unwrap_or_else(|e| panic!("{family}: {e}"));
            assert!(pair.wire.saw(&word), "{family}: the sniffer is blind");
        }
        String::new()
    });
    pair.point("without tng a stranger on the wire is served (positive control)", || {
        for addr in super::pair::SERVER {
            let answer = pair.wire.knock(addr.parse().expect("address"), super::pair::PORT, &marker("bare"));
            assert!(answer.as_ref().is_ok_and(|a| a.contains("from=")), "{addr}: {answer:?}");
        }
        String::new()
    });
}

/// What there is on a system, for [`nothing_is_left`].
pub fn inventory(host: &Container) -> Vec<String> {
    host.sh(INVENTORY).lines().map(str::to_owned).collect()
}

/// apt's source of the repository's part, `current` or `next`, as packaging/make-repo wrote it.
pub fn use_repository(host: &Container, part: &str) {
    host.sh(&format!(
        "cp {REPOSITORY}/{part}/tng-archive-keyring.gpg /usr/share/keyrings/
        sed 's|^URIs: .*|URIs: file:{REPOSITORY}/{part}|' {REPOSITORY}/{part}/tng.sources > /etc/apt/sources.list.d/tng.sources
        apt-get update -q -o APT::Update::Error-Mode=any"
    ));
}

/// `apt install tng` and what is there after it.
pub fn apt_install(pair: &Pair) {
    for host in [&pair.client, &pair.server] {
        pair.point(
            &format!("{}: apt install tng from the signed local repository, without a network", host.name),
            || {
                super::readme::install(host);
                host.sh("dpkg-query -W -f '${Version}' tng")
            },
        );
        pair.point(&format!("{}: /etc/tng is empty, 0750 root:tng", host.name), || {
            assert_eq!(host.sh("stat -c '%a %U:%G' /etc/tng").trim(), "750 root:tng");
            assert_eq!(host.sh("ls -A /etc/tng"), "");
            String::new()
        });
        pair.point(&format!("{}: units are known, and no instance runs", host.name), || {
            for unit in [
                "tng@.socket",
                "tng@.service",
                "tng-guard@.service",
                "tng-stopped@.service",
                "tng.target",
                "tng.slice",
                "tng-aa-proxy.socket",
                "tng-evidence.socket",
                "tng-evidence@.service",
            ] {
                host.sh(&format!("systemctl cat {unit}"));
            }
            assert_eq!(host.sh("systemctl list-units --no-legend --plain 'tng@*' 'tng-guard@*'"), "");
            assert!(!host.sh("nft list tables").contains("tng"));
            assert_eq!(host.try_sh("tngctl status").status.code(), Some(3), "tngctl status: not running");
            String::new()
        });
        pair.point(&format!("{}: completions, compressed manual pages and README.Debian are there", host.name), || {
            host.sh("dpkg -L tng | grep -qx /usr/share/man/man8/tngd.8.gz
                dpkg -L tng | grep -qx /usr/share/man/man5/tng.toml.5.gz
                dpkg -L tng | grep -qx /usr/share/bash-completion/completions/tngctl
                dpkg -L tng | grep -qx /usr/share/zsh/vendor-completions/_tngctl
                dpkg -L tng | grep -qx /usr/share/fish/vendor_completions.d/tngctl.fish
                dpkg -L tng | grep -qE '/usr/share/doc/tng/README.Debian(.gz)?$'");
            String::new()
        });
        pair.point(&format!("{}: systemd-analyze verify has nothing to say of the units", host.name), || {
            let out = host.try_sh("cd /usr/lib/systemd/system && systemd-analyze verify --man=no ./tng*.*");
            let said: Vec<&str> = out.stderr.lines().filter(|line| line.contains("tng")).collect();
            assert!(said.is_empty(), "{}", said.join("\n"));
            String::new()
        });
    }
}

/// `apt purge tng`, with instances running: the system is as it was.
pub fn nothing_is_left(pair: &Pair, before: &[Vec<String>; 2]) {
    pair.point("apt remove says which instance that stays closed on a stop it opens, and opens it", || {
        let host = &pair.client;
        host.write("/etc/tng/ingress.toml", &format!("on_stop = \"closed\"\n{INGRESS}"));
        host.sh("systemctl reload tng@ingress");
        let removed = host.try_sh("DEBIAN_FRONTEND=noninteractive apt-get remove -q -y tng");
        // apt gives dpkg a terminal of its own, and passes on what comes there.
        let said = format!("{}{}", removed.stdout, removed.stderr);
        assert!(removed.status.success() && said.contains("tng: ingress: on_stop = \"closed\" ends"), "{said}");
        assert!(!host.sh("nft list tables").contains("tng"));
        String::new()
    });
    for (host, before) in [&pair.client, &pair.server].into_iter().zip(before) {
        pair.point(&format!("{}: apt purge while instances run leaves no file, unit, user, table, rule or route", host.name), || {
            host.sh("test ! -e /usr/sbin/tngd || { systemctl enable tng.target 2>/dev/null || true; systemctl is-active 'tng@*'; }");
            host.sh("DEBIAN_FRONTEND=noninteractive apt-get purge -q -y tng");
            host.sh("rm -f /etc/apt/sources.list.d/tng.sources /usr/share/keyrings/tng-archive-keyring.gpg");
            let after = inventory(host);
            let traced = |line: &&String| !APT_TRACES.contains(&line.as_str());
            let more: Vec<&String> = after.iter().filter(|line| !before.contains(line)).filter(traced).collect();
            let less: Vec<&String> = before.iter().filter(|line| !after.contains(line)).filter(traced).collect();
            assert!(more.is_empty(), "left behind:\n{more:#?}");
            assert!(less.is_empty(), "taken away:\n{less:#?}");
            let processes = host.try_sh("grep -alE 'tngd|tngctl' /proc/[0-9]*/exe /proc/[0-9]*/cmdline 2>/dev/null | grep -v self || true").stdout;
            let ours: Vec<&str> = processes.lines().filter(|path| host.try_sh(&format!("tr '\\0' ' ' < {path}")).stdout.starts_with("/usr/sbin/tng")).collect();
            assert!(ours.is_empty(), "still running: {ours:?}");
            format!("{} entries compared", before.len())
        });
    }
}
