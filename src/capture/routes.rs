//! Policy routing: the rule and the local route that send captured packets around by lo.
//!
//! ```text
//! ip [-6] rule add pref 565 fwmark 0x600/0xff00 lookup 565 protocol 116
//! ip [-6] route add local default dev lo table 565 protocol 116
//! ip [-6] route add unreachable default metric 4294967295 table 565 protocol 116
//! ```
//! One set serves all instances of a network namespace. The protocol number (116, `t`) says that they are ours; rules
//! and routes of others are never touched. The unreachable route refuses what the local route no longer takes.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::ir::Family;
use super::marks::{CAPTURED_BASE, CAPTURED_MASK, ROUTE_TABLE};

/// Marks our rules and routes.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(116);
/// Index of lo in every network namespace.
const LO: u32 = 1;

/// Why rules or routes could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused.
    #[error("cannot {what} for {family}: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
}

impl RouteError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            RouteError::Socket(_) => "netlink-unavailable",
            RouteError::Kernel { .. } => "route-refused",
        }
    }
}

/// One of the parts, for failpoints and repairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The policy rule.
    Rule,
    /// The two routes.
    Routes,
}

/// Adds what is missing of `part`, both families. Says whether anything was.
pub fn ensure(part: Part) -> Result<bool, RouteError> {
    with_handle(async |handle| {
        let mut added = false;
        for family in families() {
            added |= match part {
                Part::Rule => ensure_rule(&handle, family).await?,
                Part::Routes => ensure_routes(&handle, family).await?,
            };
        }
        Ok(added)
    })
}

/// Removes ours, both families.
pub fn remove() -> Result<(), RouteError> {
    with_handle(async |handle| {
        for family in families() {
            for rule in our_rules(&handle, family).await? {
                handle.rule().del(rule).execute().await.map_err(failed("delete the policy rule", family))?;
            }
            for route in our_routes(&handle, family).await? {
                handle.route().del(route).execute().await.map_err(failed("delete the route", family))?;
            }
        }
        Ok(())
    })
}

/// What is missing, in words; empty when all is there.
pub fn missing() -> Result<Vec<String>, RouteError> {
    with_handle(async |handle| {
        let mut out = Vec::new();
        for family in families() {
            if our_rules(&handle, family).await?.is_empty() {
                out.push(format!("{} policy rule (fwmark 0x600/0xff00 lookup {ROUTE_TABLE})", name(family)));
            }
            let routes = our_routes(&handle, family).await?;
            if !routes.iter().any(|r| r.header.kind == RouteType::Local) {
                out.push(format!("{} local route in table {ROUTE_TABLE}", name(family)));
            }
        }
        Ok(out)
    })
}

/// Runs netlink I/O to its end on a small runtime of its own: callers are privileged commands, not the data plane.
fn with_handle<T>(work: impl AsyncFnOnce(Handle) -> Result<T, RouteError>) -> Result<T, RouteError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let driver = tokio::spawn(connection);
        let result = work(handle).await;
        driver.abort();
        result
    })
}

/// IPv6 only where the kernel has it.
fn families() -> Vec<Family> {
    let mut families = vec![Family::V4];
    if std::path::Path::new("/proc/net/if_inet6").exists() {
        families.push(Family::V6);
    }
    families
}

fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

fn failed(what: &'static str, family: Family) -> impl Fn(rtnetlink::Error) -> RouteError {
    move |source| RouteError::Kernel { what, family: name(family), source }
}

async fn our_rules(handle: &Handle, family: Family) -> Result<Vec<RuleMessage>, RouteError> {
    let version = match family {
        Family::V4 => IpVersion::V4,
        Family::V6 => IpVersion::V6,
    };
    let all: Vec<RuleMessage> =
        handle.rule().get(version).execute().try_collect().await.map_err(failed("list the policy rules", family))?;
    Ok(all.into_iter().filter(is_our_rule).collect())
}

fn is_our_rule(rule: &RuleMessage) -> bool {
    let has = |wanted: &RuleAttribute| rule.attributes.contains(wanted);
    has(&RuleAttribute::Protocol(PROTOCOL))
        && has(&RuleAttribute::FwMark(CAPTURED_BASE))
        && (has(&RuleAttribute::Table(ROUTE_TABLE)) || u32::from(rule.header.table) == ROUTE_TABLE)
}

async fn our_routes(handle: &Handle, family: Family) -> Result<Vec<RouteMessage>, RouteError> {
    let filter = match family {
        Family::V4 => RouteMessageBuilder::<Ipv4Addr>::new().build(),
        Family::V6 => RouteMessageBuilder::<Ipv6Addr>::new().build(),
    };
    let all: Vec<RouteMessage> =
        handle.route().get(filter).execute().try_collect().await.map_err(failed("list the routes", family))?;
    let ours = |route: &RouteMessage| {
        route.header.protocol == PROTOCOL && route.attributes.contains(&RouteAttribute::Table(ROUTE_TABLE))
    };
    Ok(all.into_iter().filter(ours).collect())
}

async fn ensure_rule(handle: &Handle, family: Family) -> Result<bool, RouteError> {
    if !our_rules(handle, family).await?.is_empty() {
        return Ok(false);
    }
    let mut add = handle
        .rule()
        .add()
        .fw_mark(CAPTURED_BASE)
        .table_id(ROUTE_TABLE)
        .priority(ROUTE_TABLE)
        .action(RuleAction::ToTable);
    let message = add.message_mut();
    message.header.family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message.attributes.push(RuleAttribute::FwMask(CAPTURED_MASK));
    message.attributes.push(RuleAttribute::Protocol(PROTOCOL));
    existing_is_fine(add.execute().await).map_err(failed("add the policy rule", family))?;
    Ok(true)
}

async fn ensure_routes(handle: &Handle, family: Family) -> Result<bool, RouteError> {
    let present = our_routes(handle, family).await?;
    let mut added = false;
    for kind in [RouteType::Local, RouteType::Unreachable] {
        if present.iter().any(|r| r.header.kind == kind) {
            continue;
        }
        let message = match family {
            Family::V4 => default_route_v4(kind),
            Family::V6 => default_route_v6(kind),
        };
        existing_is_fine(handle.route().add(message).execute().await).map_err(failed("add the route", family))?;
        added = true;
    }
    Ok(added)
}

fn default_route_v4(kind: RouteType) -> RouteMessage {
    let builder = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
        .table_id(ROUTE_TABLE)
        .protocol(PROTOCOL)
        .kind(kind);
    match kind {
        RouteType::Local => builder.output_interface(LO).scope(RouteScope::Host).build(),
        _ => builder.priority(u32::MAX).build(),
    }
}

fn default_route_v6(kind: RouteType) -> RouteMessage {
    let builder = RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
        .table_id(ROUTE_TABLE)
        .protocol(PROTOCOL)
        .kind(kind);
    match kind {
        RouteType::Local => builder.output_interface(LO).build(),
        _ => builder.output_interface(LO).priority(u32::MAX).build(),
    }
}

/// Another instance may have added it between our look and our request.
fn existing_is_fine(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::EEXIST => Ok(()),
        other => other,
    }
}
