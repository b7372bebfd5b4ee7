//! The line that lets the trial's packets pass where they were lost (tngd(8), BESIDE A FIREWALL).

use super::Way;
use crate::capture::ir::Family;
use crate::config::Side;

/// Priority of tng's chain at output: behind it captured packets carry their mark.
const MARKED: i64 = -150;
/// The tables of iptables-nft, whose rules are iptables' to write.
const OF_IPTABLES: [&str; 5] = ["filter", "mangle", "raw", "nat", "security"];

/// Where a packet was lost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// Family and table.
    pub table: &'a str,
    pub chain: &'a str,
    pub hook: &'a str,
    pub priority: i64,
    pub way: Way,
    pub side: Side,
    pub family: Family,
    /// The captured port.
    pub port: u16,
}

/// What a line asks for, before `accept`.
enum Which {
    Captured,
    FromLo,
    ToLo,
    ToPort(u16),
    FromPort(u16),
}

fn which(place: &Place<'_>) -> Which {
    match (place.side, place.way, place.hook) {
        // Captured packets still have the device that they would have left by.
        (Side::Ingress, Way::Syn, "output") if place.priority > MARKED => Which::Captured,
        (Side::Ingress, Way::Syn, "output") => Which::ToPort(place.port),
        (Side::Ingress, _, "prerouting" | "input") => Which::FromLo,
        (Side::Ingress, ..) => Which::ToLo,
        (Side::Egress, Way::Syn, _) => Which::ToPort(place.port),
        (Side::Egress, Way::Answer, _) => Which::FromPort(place.port),
    }
}

/// The command.
pub(super) fn cure(place: &Place<'_>) -> String {
    let (family, table) = place.table.split_once(' ').unwrap_or(("inet", place.table));
    let is_iptables = OF_IPTABLES.contains(&table)
        && ["ip", "ip6"].contains(&family)
        && place.chain.chars().next().is_some_and(char::is_uppercase);
    let which = which(place);
    if is_iptables {
        let program = if place.family == Family::V4 { "iptables" } else { "ip6tables" };
        let conditions = match which {
            Which::Captured => "-m mark --mark 0x600/0xff00".to_owned(),
            Which::FromLo => "-i lo".to_owned(),
            Which::ToLo => "-o lo".to_owned(),
            Which::ToPort(port) => format!("-p tcp --dport {port}"),
            Which::FromPort(port) => format!("-p tcp --sport {port}"),
        };
        return format!("{program} -t {table} -I {} {conditions} -j ACCEPT", place.chain);
    }
    let line = match which {
        Which::Captured => "'meta mark & 0xff00 == 0x0600 accept'".to_owned(),
        Which::FromLo => "iif lo accept".to_owned(),
        Which::ToLo => "oif lo accept".to_owned(),
        Which::ToPort(port) => format!("tcp dport {port} accept"),
        Which::FromPort(port) => format!("tcp sport {port} accept"),
    };
    format!("nft insert rule {family} {table} {} {line}  # and in the file that loads this table", place.chain)
}
