//! `tngctl doctor`: each finding in a world that has the fault, beside the same world without it; and the real thing.

#[path = "../fakes/mod.rs"]
mod fakes;
#[allow(dead_code)]
#[path = "../leaks/lab.rs"]
mod lab;
#[path = "../netns/mod.rs"]
mod netns;

#[allow(dead_code)]
#[path = "../leaks/table.rs"]
mod table;

mod faults;
mod manual;
mod real;
mod saved;
mod trial;
mod world;
