//! `tngctl connections` for people.

use std::time::SystemTime;

use crate::daemon::{ConnectionsReport, unix_seconds};

use super::style::{human_age, human_bytes, printable, table};

/// The live connections of one instance as a table.
pub(super) fn render(instance: &str, report: &ConnectionsReport) -> String {
    let header = [
        "INSTANCE",
        "ID",
        "ENDPOINT",
        "SIDE",
        "SOURCE",
        "DESTINATION",
        "PEER",
        "TEE",
        "BINDING",
        "VERDICT",
        "STATE",
        "AGE",
        "UP",
        "DOWN",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let now = unix_seconds(SystemTime::now());
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { printable(text) };
    for c in &report.connections {
        rows.push(vec![
            instance.to_owned(),
            c.id.to_string(),
            printable(&c.endpoint),
            printable(&c.side),
            printable(&c.src),
            or_dash(&c.dst),
            or_dash(&c.peer),
            or_dash(&c.tee),
            or_dash(&c.binding),
            c.verdict_expires.map_or_else(|| "-".to_owned(), |at| human_age(at.saturating_sub(now))),
            c.closing.as_ref().map_or_else(|| printable(&c.state), super::status::closing),
            human_age(c.age_ms / 1000),
            human_bytes(c.bytes_up),
            human_bytes(c.bytes_down),
        ]);
    }
    let mut text = table(&rows, "");
    let more = report.total.saturating_sub(report.connections.len());
    if more > 0 {
        text.push_str(&format!("and {more} more\n"));
    }
    text
}
