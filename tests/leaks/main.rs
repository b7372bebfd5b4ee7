//! The leak matrix: every way known by which plaintext could get past tng, on IPv4 and IPv6.
//!
//! Each row first shows with tng off that the sniffer (or the service) sees this kind of traffic
//! in plaintext, then sets its scenario up with tng on and demands that it does not. Documented
//! limits are demanded as such (`Open`), so that the table tells the truth in both directions.
//! `TNG_ROW=text` runs the rows whose name contains the text.

#[path = "../netns/mod.rs"]
mod netns;

mod controls;
mod counts;
mod egress;
mod egress_beside;
mod egress_faults;
mod failed;
mod firewalls;
mod ingress;
mod ingress_faults;
mod lab;
mod lifecycle;
mod table;

#[test]
fn ingress_never_sends_plaintext() {
    table::run("ingress, nothing broken", ingress::ROWS);
}

#[test]
fn ingress_never_sends_plaintext_on_a_bad_day() {
    table::run("ingress, bad days", ingress_faults::ROWS);
}

#[test]
fn neither_side_leaks_beside_a_firewall() {
    table::run("beside a firewall", firewalls::ROWS);
}

#[test]
fn egress_never_lets_plaintext_in_or_out() {
    table::run("egress, nothing broken", egress::ROWS);
}

#[test]
fn egress_never_lets_plaintext_in_or_out_beside_other_software() {
    table::run("egress, beside other software", egress_beside::ROWS);
}

#[test]
fn egress_never_lets_plaintext_in_or_out_on_a_bad_day() {
    table::run("egress, bad days", egress_faults::ROWS);
}

#[test]
fn a_command_that_fails_opens_nothing() {
    table::run("commands that fail", failed::ROWS);
}
