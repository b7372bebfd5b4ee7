//! From the file as written to what it means: every field checked, every finding collected.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::check_effect;
use super::check_netfilter::netfilter;
use super::check_ra::ra;
use super::conflicts;
use super::diagnostics::{Place, Sink, quote, suggest};
use super::raw::{RawEndpoint, RawFile, RawLimits, RawMapping};
use super::reader::At;
use super::values::{self, duration};
use super::{
    Config, DEFAULT_EGRESS_MARK, DEFAULT_INGRESS_MARK, Endpoint, EndpointName, InstanceName, Limits, Mapping, Mark,
    Mode, OnStop, Side,
};

/// Endpoints of one file. Each needs its own mark of the 256 in 0x0600-0x06ff.
const MAX_ENDPOINTS: usize = 128;
const MAX_CONNECTIONS: i64 = 1_000_000;
const DEFAULT_DRAIN: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_millis(1);

/// The configuration, if nothing in it is wrong; the findings are in `sink` either way.
pub(super) fn check(raw: &RawFile, instance: InstanceName, source: &Path, sink: &mut Sink<'_>) -> Option<Config> {
    let on_stop = raw.on_stop.as_ref().map_or(Some(OnStop::default()), |At { value, at }| match value.as_str() {
        "open" => Some(OnStop::Open),
        "closed" => Some(OnStop::Closed),
        other => {
            let message = format!("unknown value {}", quote(other));
            sink.error(at, "unknown-value", message, suggest(other, &["open", "closed"]));
            None
        }
    });
    let drain = duration(raw.drain_timeout.as_ref(), DEFAULT_DRAIN, Duration::ZERO, HOUR, sink);
    let control = raw.control.as_ref().and_then(|c| c.value.listen.as_ref());
    let control = control.map_or(Some(None), |raw| control_listen(raw, sink).map(Some));

    let root = Place { offset: 0, path: String::new() };
    let empty = Vec::new();
    let list = |side: Side| match side {
        Side::Ingress => raw.ingress.as_ref().map_or(&empty, |a| &a.value),
        Side::Egress => raw.egress.as_ref().map_or(&empty, |a| &a.value),
    };
    let sides = [Side::Ingress, Side::Egress];
    let count: usize = sides.iter().map(|side| list(*side).len()).sum();
    if count == 0 && !sink.has_errors_below("ingress") && !sink.has_errors_below("egress") {
        sink.error(&root, "no-endpoint", "no endpoint in this file", "add an [[ingress]] or [[egress]] table");
    }
    if count > MAX_ENDPOINTS {
        let message = format!("{count} endpoints, more than {MAX_ENDPOINTS}");
        sink.error(&root, "too-many", message, "an endpoint takes many captures; or use several files");
        return None;
    }
    let mut names: Vec<(EndpointName, Place)> = Vec::new();
    let mut endpoints = Vec::new();
    for side in sides {
        for raw in list(side) {
            // Entries that could not be read are not in the list: the index is in the path.
            let index = raw.at.path.rsplit('[').next().unwrap_or_default().trim_end_matches(']').to_owned();
            let name = endpoint_name(raw, side, &index, &mut names, sink);
            if let Some(parts) = endpoint(raw, side, sink).zip(name) {
                let ((mode, ra, limits), name) = parts;
                endpoints.push((raw.at.path.clone(), Endpoint { name, side, mode, ra, limits }));
            }
        }
    }
    check_effect::own_names(&root, endpoints.iter().map(|(_, endpoint)| endpoint), sink);
    let control = control?;
    conflicts::within(&endpoints, control, sink);
    if sink.has_errors() {
        return None;
    }
    Some(Config {
        instance,
        source: source.to_owned(),
        on_stop: on_stop?,
        drain_timeout: drain?,
        control_listen: control,
        endpoints: endpoints.into_iter().map(|(_, endpoint)| endpoint).collect(),
    })
}

fn control_listen(raw: &At<String>, sink: &mut Sink<'_>) -> Option<SocketAddr> {
    let (addr, ports) = values::listen(raw, sink)?;
    if ports.len() != 1 {
        sink.error(&raw.at, "bad-port", format!("{} is more than one port", quote(&raw.value)), "write one port");
        return None;
    }
    if !addr.is_loopback() {
        let message = format!("the control API on {} asks nobody for a password", quote(&raw.value));
        sink.warn(&raw.at, "control-exposed", message, "listen on 127.0.0.1, or filter who may connect");
    }
    Some(SocketAddr::new(addr, ports.first))
}

fn endpoint_name(
    raw: &At<RawEndpoint>,
    side: Side,
    index: &str,
    names: &mut Vec<(EndpointName, Place)>,
    sink: &mut Sink<'_>,
) -> Option<EndpointName> {
    let (text, at) = match &raw.value.name {
        Some(At { value, at }) => (value.clone(), at),
        None => (format!("{side}-{index}"), &raw.at),
    };
    let name = EndpointName::new(&text)
        .map_err(|_| {
            let hint = "1 to 32 of a-z, 0-9 and -, beginning with a letter or digit";
            sink.error(at, "bad-name", format!("{} is not a legal name", quote(&text)), hint);
        })
        .ok()?;
    if let Some((_, first)) = names.iter().find(|(n, _)| *n == name) {
        let (line, _) = sink.position(first.offset);
        let message = format!("the name \"{name}\" is taken by {} (line {line})", first.path);
        sink.error(at, "duplicate-name", message, "names are unique over both sides of a file");
    }
    names.push((name.clone(), at.clone()));
    Some(name)
}

type Parts = (Mode, super::Ra, Limits);

fn endpoint(raw: &At<RawEndpoint>, side: Side, sink: &mut Sink<'_>) -> Option<Parts> {
    let default_mark = match side {
        Side::Ingress => DEFAULT_INGRESS_MARK,
        Side::Egress => DEFAULT_EGRESS_MARK,
    };
    let RawEndpoint { mapping: raw_mapping, netfilter: raw_netfilter, limits: raw_limits, .. } = &raw.value;
    let mode = match (raw_mapping, raw_netfilter) {
        (Some(m), None) => mapping(m, default_mark, sink).map(Mode::Mapping),
        (None, Some(n)) => netfilter(n, side, default_mark, sink).map(Mode::Netfilter),
        (Some(m), Some(n)) => {
            let hint = "make it two endpoints, each with its own mode";
            sink.error(&n.at, "mode-count", "both `mapping` and `netfilter` in one endpoint", hint);
            // Both are read all the same, so that their errors show in this run.
            mapping(m, default_mark, sink);
            netfilter(n, side, default_mark, sink);
            None
        }
        (None, None) if sink.is_written(&raw.at, "mapping") || sink.is_written(&raw.at, "netfilter") => None,
        (None, None) => {
            let hint = format!("add [{side}.mapping] or [{side}.netfilter]");
            sink.error(&raw.at, "mode-count", "no mode: neither `mapping` nor `netfilter`", hint);
            None
        }
    };
    let ra = ra(raw, side, sink);
    let limits = raw_limits.as_ref().map_or_else(|| Some(Limits::default()), |raw| limits(raw, sink));
    Some((mode?, ra?, limits?))
}

fn mapping(raw: &At<RawMapping>, mark: Mark, sink: &mut Sink<'_>) -> Option<Mapping> {
    let RawMapping { listen, target, so_mark, .. } = &raw.value;
    for (key, value, example) in
        [("listen", listen.is_some(), "127.0.0.1:10001"), ("target", target.is_some(), "192.0.2.10:20001")]
    {
        if !value && !sink.is_written(&raw.at, key) {
            sink.error(&raw.at, "missing", format!("`{key}` is missing"), format!("add {key} = \"{example}\""));
        }
    }
    let so_mark = values::mark(so_mark.as_ref(), mark, sink);
    let from = listen.as_ref().and_then(|raw| values::listen(raw, sink));
    let to = target.as_ref().and_then(|raw| values::target(raw, sink));
    let ((listen_addr, listen_ports), (target_host, target_ports)) = from.zip(to)?;
    if listen_ports.len() != target_ports.len() {
        let (asked, given) = (listen_ports.len(), target_ports.len());
        let message = format!("{given} target ports ({target_ports}) for {asked} listen ports ({listen_ports})");
        let last = usize::from(target_ports.first) + asked - 1;
        let hint = if last > 65535 || asked == 1 {
            "both ranges must hold as many ports".to_owned()
        } else {
            format!("write \"{target_host}:{}-{last}\"", target_ports.first)
        };
        sink.error(&target.as_ref()?.at, "range-mismatch", message, hint);
        return None;
    }
    Some(Mapping { listen_addr, listen_ports, target_host, target_ports, so_mark: so_mark? })
}

fn limits(raw: &At<RawLimits>, sink: &mut Sink<'_>) -> Option<Limits> {
    let RawLimits {
        max_connections,
        handshake_timeout,
        first_byte_timeout,
        connect_timeout,
        idle_timeout,
        unacknowledged_timeout,
        ..
    } = &raw.value;
    let default = Limits::default();
    let connections = max_connections.as_ref().map_or(Some(default.max_connections), |At { value, at }| {
        if (1..=MAX_CONNECTIONS).contains(value) {
            return usize::try_from(*value).ok();
        }
        let message = format!("{value} is not 1-{MAX_CONNECTIONS}");
        sink.error(at, "out-of-range", message, format!("the default is {}", default.max_connections));
        None
    });
    let ten = Duration::from_secs(600);
    let handshake = duration(handshake_timeout.as_ref(), default.handshake_timeout, SOON, ten, sink);
    let first_byte = duration(first_byte_timeout.as_ref(), default.first_byte_timeout, SOON, ten, sink);
    let connect = duration(connect_timeout.as_ref(), default.connect_timeout, SOON, ten, sink);
    let idle = duration(idle_timeout.as_ref(), default.idle_timeout, Duration::ZERO, HOUR * 24 * 7, sink);
    let unacknowledged =
        duration(unacknowledged_timeout.as_ref(), default.unacknowledged_timeout, Duration::ZERO, HOUR, sink);
    let too_short = |d: &Duration| !d.is_zero() && *d < Duration::from_secs(1);
    if let (Some(raw), true) = (unacknowledged_timeout, unacknowledged.as_ref().is_some_and(too_short)) {
        let hint = "from 1s to 1h, or 0s for the kernel's own measure";
        sink.error(&raw.at, "out-of-range", format!("\"{}\" is out of range", raw.value), hint);
        return None;
    }
    Some(Limits {
        max_connections: connections?,
        handshake_timeout: handshake?,
        first_byte_timeout: first_byte?,
        connect_timeout: connect?,
        idle_timeout: idle?,
        unacknowledged_timeout: unacknowledged?,
    })
}
