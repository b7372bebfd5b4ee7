//! Changed input for property tests: cheap enough for 1e5 cases, and close enough to good input to get past the first
//! check of a parser.

use proptest::prelude::*;
use serde_json::{Value, json};

/// Cases of each property in CI.
pub const CASES: u32 = 100_000;

/// Up to three changed bytes, and where to cut.
#[derive(Debug, Clone)]
pub struct Change {
    bytes: [(u16, u8); 3],
    count: u8,
    cut: Option<u16>,
}

impl Change {
    /// `good`, changed.
    pub fn of(&self, good: &[u8]) -> Vec<u8> {
        let mut bad = good.to_vec();
        for (at, byte) in &self.bytes[..usize::from(self.count)] {
            if let Some(place) = usize::from(*at).checked_rem(good.len()) {
                bad[place] = *byte;
            }
        }
        if let Some(cut) = self.cut {
            bad.truncate(usize::from(cut) % (good.len() + 1));
        }
        bad
    }
}

/// Any [`Change`]; one of eight cuts.
pub fn change() -> impl Strategy<Value = Change> {
    (any::<[(u16, u8); 3]>(), 0u8..4, any::<(u16, u8)>()).prop_map(|(bytes, count, (at, whether))| Change {
        bytes,
        count,
        cut: (whether < 32).then_some(at),
    })
}

/// What stands in place of a member of good JSON.
const ODD: usize = 16;

fn odd(which: usize) -> Value {
    match which % ODD {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(0),
        3 => json!(-1),
        4 => json!(u64::MAX),
        5 => json!(1e300),
        6 => json!(""),
        7 => json!("\u{0}\u{1b}[31m\u{ffff}"),
        8 => json!("====="),
        9 => json!([]),
        10 => json!([[], {}]),
        11 => json!({}),
        12 => json!({ "": { "": null } }),
        13 => json!("affirming"),
        14 => json!("x".repeat(300)),
        _ => json!(["default", "default"]),
    }
}

/// `good` with its `at`-th value, counted from the root, in place of something odd.
pub fn changed(good: &Value, at: u16, which: u8) -> Value {
    fn count(value: &Value) -> usize {
        1 + match value {
            Value::Object(members) => members.values().map(count).sum(),
            Value::Array(items) => items.iter().map(count).sum(),
            _ => 0,
        }
    }
    fn put(value: &mut Value, left: &mut usize, to: &Value) {
        if *left == 0 {
            *value = to.clone();
        }
        *left = left.wrapping_sub(1);
        match value {
            Value::Object(members) if *left < usize::MAX / 2 => members.values_mut().for_each(|v| put(v, left, to)),
            Value::Array(items) if *left < usize::MAX / 2 => items.iter_mut().for_each(|v| put(v, left, to)),
            _ => {}
        }
    }
    let mut bad = good.clone();
    let mut left = usize::from(at) % count(good);
    put(&mut bad, &mut left, &odd(usize::from(which)));
    bad
}

#[test]
fn every_value_can_be_changed_and_only_one_is() {
    let good = json!({ "a": [1, { "b": "c" }], "d": false });
    let all: Vec<_> = (0..6).map(|at| changed(&good, at, 1)).collect();
    assert_eq!(all[0], json!(true));
    assert_eq!(all[1], json!({ "a": true, "d": false }));
    assert_eq!(all[2], json!({ "a": [true, { "b": "c" }], "d": false }));
    assert_eq!(all[3], json!({ "a": [1, true], "d": false }));
    assert_eq!(all[4], json!({ "a": [1, { "b": true }], "d": false }));
    assert_eq!(all[5], json!({ "a": [1, { "b": "c" }], "d": true }));
}
