//! Captures by cgroup need the unified hierarchy, and the slices that they name.

use super::finding::{Check, Finding};
use super::host::Host;
use super::instance::Wants;

/// Layout and slices.
pub(super) fn check(host: &dyn Host, wants: &Wants) -> Vec<Finding> {
    if host.exists("/sys/fs/cgroup/cgroup.controllers") {
        let mut found = vec![Finding::ok(Check::CgroupLayout, "cgroup v2 alone")];
        found.extend(wants.slices.iter().map(|(instance, slice)| judge(host, instance, slice)));
        return found;
    }
    let what = if host.exists("/sys/fs/cgroup/unified") { "cgroup v1 with v2 beside it" } else { "no cgroup v2" };
    let finding = if wants.slices.is_empty() {
        Finding::note(Check::CgroupLayout, what).why("captures with `cgroup` would not work here; no instance has one")
    } else {
        Finding::error(Check::CgroupLayout, what)
            .why("nft matches cgroups of the unified hierarchy at /sys/fs/cgroup only; such captures do not start")
    };
    vec![finding.fix(
        "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&systemd.unified_cgroup_hierarchy=1 /' /etc/default/grub && update-grub && \
         systemctl reboot",
    )]
}

fn judge(host: &dyn Host, instance: &str, slice: &str) -> Finding {
    let check = Check::CgroupSlice;
    if host.exists(&format!("/sys/fs/cgroup/{slice}/cgroup.procs")) {
        return Finding::ok(check, format!("{slice} exists")).of(instance);
    }
    let unit = slice.rsplit('/').next().unwrap_or(slice);
    Finding::error(check, format!("cgroup {slice} does not exist"))
        .why("a rule for a cgroup that is not there cannot be loaded")
        .fix(format!("systemctl start {unit} && systemctl restart tng-guard@{instance} tng@{instance}"))
        .of(instance)
}
