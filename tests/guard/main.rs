//! `tngd guard` under a service manager that keeps its descriptors: killed, restarted, changed, stopped, hung, idle.

#[allow(dead_code)]
#[path = "../leaks/lab.rs"]
mod lab;
#[path = "../netns/mod.rs"]
mod netns;
#[allow(dead_code)]
#[path = "../leaks/table.rs"]
mod table;

mod idle;
mod manager;
mod notify;
mod survival;
