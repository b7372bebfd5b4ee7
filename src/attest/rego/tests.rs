use serde_json::{Value as Json, json};

use super::*;

/// A policy of these lines.
fn policy(rules: &str) -> Policy {
    let text = format!("package tng\n{rules}\n");
    Policy::compile(&text).unwrap_or_else(|problem| panic!("{problem}\n{text}"))
}

async fn judged(rules: &str, document: Json) -> Result<(), PolicyError> {
    policy(rules).judge(document).await
}

/// The same of a policy that needs most of its time in a debug build: a machine that is busy elsewhere is asked again.
async fn judged_in_time(rules: &str) -> Result<(), PolicyError> {
    let mut answer = Err(PolicyError::Timeout);
    for _ in 0..20 {
        if answer != Err(PolicyError::Timeout) {
            break;
        }
        answer = judged(rules, guest()).await;
    }
    answer
}

async fn refusal(rules: &str, document: Json) -> (String, String) {
    let error = judged(rules, document).await.expect_err(rules);
    (error.reason().to_owned(), error.to_string())
}

fn problem(text: &str) -> String {
    Policy::compile(text).err().unwrap_or_else(|| panic!("accepted: {text}")).to_string()
}

fn guest() -> Json {
    json!({
        "tee": "snp", "debug": false, "sample": false, "bound_to": "session", "trust_anchor": "x",
        "claims": {"measurement": "c3c3", "vmpl": 0, "tcb_snp": 20, "advisories": ["A", "B"]},
        "runtime_data": {"pubkey-hash": "x"},
    })
}

const ORDINARY: &str = "
default allow := false
good := {\"c3c3\", \"c4c4\"}
allow if {
    input.tee == \"snp\"
    input.claims.vmpl == 0
    input.claims.measurement in good
    new_enough(input.claims.tcb_snp)
}
new_enough(version) if version >= 20
deny contains sprintf(\"advisory %v\", [advisory]) if {
    some advisory in input.claims.advisories
    not advisory in {\"A\", \"B\"}
}
";

#[tokio::test]
async fn an_ordinary_policy_lets_in_whom_it_describes() {
    assert_eq!(judged(ORDINARY, guest()).await, Ok(()));
    for (member, value) in [("measurement", json!("c5c5")), ("vmpl", json!(1)), ("tcb_snp", json!(19))] {
        let mut other = guest();
        other["claims"][member] = value;
        let (reason, text) = refusal(ORDINARY, other).await;
        assert_eq!(reason, "policy-denied", "{member}");
        assert!(text.ends_with("allow is false"), "{text}");
    }
}

#[tokio::test]
async fn a_reason_to_deny_is_shown_and_outweighs_allow() {
    let mut other = guest();
    other["claims"]["advisories"] = json!(["A", "C", "D"]);
    let (reason, text) = refusal(ORDINARY, other).await;
    assert_eq!(reason, "policy-denied");
    assert!(text.ends_with("allow the peer: advisory C; advisory D"), "{text}");
    // Also where allow says nothing of its own.
    let (_, text) = refusal("allow := false\ndeny contains \"because\"", guest()).await;
    assert!(text.ends_with(": because"), "{text}");
}

#[tokio::test]
async fn only_the_word_true_lets_in() {
    for (rules, reason, words) in [
        ("allow if input.nothing", "policy-denied", "allow is undefined"),
        ("allow := false", "policy-denied", "allow is false"),
        ("allow := 1", "policy-error", "allow is a number"),
        ("allow := \"true\"", "policy-error", "allow is a string"),
        ("allow contains \"x\"", "policy-error", "allow is a set"),
        ("allow := true\ndeny := 5", "policy-error", "deny is a number"),
        ("allow := true\ndeny contains 5", "policy-error", "deny holds a number"),
        ("allow := true\ndeny := {\"a\": 1}", "policy-error", "deny is an object"),
        // Two answers at once.
        ("allow := x if { some x in [true, false] }", "policy-error", ""),
    ] {
        let (found, text) = refusal(rules, guest()).await;
        assert_eq!(found, reason, "{rules}: {text}");
        assert!(text.contains(words), "{rules}: {text}");
    }
    assert_eq!(judged("allow := true\ndeny := []", guest()).await, Ok(()));
    assert_eq!(judged("allow := true\ndeny contains \"x\" if input.nothing", guest()).await, Ok(()));
}

#[tokio::test]
async fn a_function_that_fails_refuses_also_behind_not() {
    for rules in [
        "allow if not to_number(input.tee) > 3",
        "allow := true\ndeny contains \"old\" if to_number(input.tee) < 3",
        "allow if not small(input.tee)\nsmall(x) if to_number(x) < 3",
        "allow if not 1 / input.claims.vmpl == 5",
    ] {
        let (reason, text) = refusal(rules, guest()).await;
        assert_eq!(reason, "policy-error", "{rules}: {text}");
        assert!(text.contains("failed: 2:") || text.contains("failed: 3:"), "its place is named: {text}");
    }
}

#[tokio::test]
async fn rules_that_wait_for_each_other_refuse() {
    for rules in ["allow if a\na if b\nb if a", "allow if not allow"] {
        let (reason, text) = refusal(rules, guest()).await;
        assert_eq!(reason, "policy-error", "{rules}");
        assert!(text.contains("recursion") && !text.contains('\n'), "{text}");
    }
}

#[tokio::test]
async fn a_policy_that_does_not_end_is_stopped() {
    let loops: String = "abcdefgh".chars().map(|name| format!("some {name} in xs; ")).collect();
    let xs: Vec<String> = (0..64).map(|n| n.to_string()).collect();
    let xs = format!("xs := [{}]", xs.join(","));
    for rules in [
        format!("{xs}\nallow if {{ {loops} a + b + c + d + e + f + g + h == 1000 }}"),
        format!("{xs}\nallow if not long(1)\nlong(n) if {{ {loops} a + b + c + d + e + f + g + h == 1000 + n }}"),
        format!("{xs}\nallow := true\ndeny contains \"x\" if {{ {loops} a + b + c + d + e + f + g + h == 1000 }}"),
    ] {
        let started = Instant::now();
        let (reason, text) = refusal(&rules, guest()).await;
        assert_eq!((reason.as_str(), text.contains("1 s")), ("policy-timeout", true), "{text}");
        assert!(started.elapsed() < Duration::from_secs(60), "it went on for {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn only_so_many_run_at_once_and_the_rest_gets_its_turn() {
    let policy = Arc::new(policy(ORDINARY));
    let all: Vec<_> = (0..64)
        .map(|_| {
            let policy = policy.clone();
            tokio::spawn(async move { policy.judge(guest()).await })
        })
        .collect();
    // Who gives up leaves nothing behind.
    all[5].abort();
    for (n, one) in all.into_iter().enumerate() {
        match one.await {
            Ok(outcome) => assert_eq!(outcome, Ok(())),
            Err(e) => assert!(n == 5 && e.is_cancelled(), "{e}"),
        }
    }
    let free = tokio::time::timeout(Duration::from_secs(10), policy.places.acquire_many(AT_ONCE as u32)).await;
    assert!(free.expect("all have ended").is_ok());
}

#[test]
fn a_mistake_has_its_place() {
    for (text, place, words) in [
        ("package tng\nallow if {\n  input.tee ==\n}\n", "4:1: ", "expect"),
        ("package tng\nallow if x > 1\n", "2:10: ", "x"),
        ("package tng\nallow if http.send({\"url\": \"http://a/\"})\n", "2:10: ", "there is no function http.send"),
        ("package tng\nallow if time.now_ns() > 1\n", "2:10: ", "there is no function time.now_ns"),
        ("package tng\nallow if opa.runtime().env.HOME\n", "2:", "opa.runtime"),
        ("package tng\nallow if rand.intn(\"a\", 2) == 1\n", "2:", "rand.intn"),
        ("package tng\nallow if count(numbers.range(1, 9)) > 1\n", "2:", "numbers.range is not for policies"),
        ("package tng\nallow if bits.lsh(1, 9) > 1\n", "2:", "bits.lsh is not for policies"),
        ("package tng\nallow if trace(\"x\")\n", "2:", "trace is not for policies"),
        ("package tng\nallow if g(1) == 1 with count as nosuch(1)\ng(x) := x\n", "2:", "nosuch"),
        ("package other\nallow := true\n", "1:1: ", "package tng"),
        ("package tng.more\nallow := true\n", "1:1: ", "package tng"),
        ("package tng\nalow := true\n", "1:1: ", "no rule `allow`"),
        ("package tng\nallow(x) := f(x)\nf(x) := x\n", "", "allow"),
        ("", "1:", "package"),
    ] {
        let found = problem(text);
        assert!(found.starts_with(place) && found.contains(words), "{text}: {found}");
        assert!(!found.contains('\n'), "{found}");
    }
    assert!(problem(&format!("package tng\nallow := true\n#{}", "x".repeat(MAX_TEXT))).contains("64 KiB"));
    // Bytes of the file come back printable.
    let hostile = problem("package tng\nallow if \"\u{1b}[2J\u{202e}");
    assert!(!hostile.contains(['\u{1b}', '\u{202e}']), "{hostile:?}");
}

#[test]
fn functions_that_call_themselves_are_refused() {
    for rules in [
        "f(x) := f(x)",
        "f(x) := g(x)\ng(x) := h(x)\nh(x) := f(x)",
        "f(x) := y if { y := data.tng.f(x) }",
        "f(x) := [y | y := f(x)]",
        "f(x) if { every y in x { f(y) } }",
        "f(x) := y if { y := count(x) with count as f }",
        "f(x) := 1 if { x > 1 } else := f(x)",
        "f(x) := 1 if { g(x) == 1 }\ng(x) := 1\ng(x) := f(x) if x > 1",
        "a.b(x) := data.tng.a.b(x)",
    ] {
        let found = problem(&format!("package tng\nallow := true\n{rules}\n"));
        assert!(found.contains("calls itself"), "{rules}: {found}");
    }
    let found = problem("package tng\nimport data.tng.f as g\nallow := true\nf(x) := g(x)\n");
    assert!(found.contains("calls itself"), "{found}");
    // Through a rule it is found when it runs; one below another is no recursion.
    policy("allow if f(1)\nf(x) := g(x) + g(x)\ng(x) := h(x)\nh(x) := x");
}

#[tokio::test]
async fn a_function_that_comes_back_through_a_rule_refuses() {
    let (reason, text) = refusal("allow if f(1)\nf(x) := r + x\nr := f(2)", guest()).await;
    assert_eq!(reason, "policy-error", "{text}");
    assert!(text.contains("recursion"), "{text}");
}

#[tokio::test]
async fn the_deepest_policy_that_is_accepted_fits_the_stack() {
    // Every rule waits for the next one, each from within comprehensions in comprehensions.
    let nested = |depth: usize, inner: &str| format!("{}{inner}{}", "[x|x:=".repeat(depth), "]".repeat(depth));
    let fits = |depth: &usize| Policy::compile(&format!("package tng\nallow := {}", nested(*depth, "1"))).is_ok();
    let depth = (1..64).rev().find(fits).expect("some depth");
    assert!(depth > 8, "{depth}");
    let chain = |head: &dyn Fn(usize) -> String| -> String {
        (0..CHAIN).map(|n| format!("{} := {}\n", head(n), nested(depth, &head(n + 1)))).collect()
    };
    let rule = |n: usize| format!("r{n}");
    assert_eq!(judged_in_time(&format!("allow if r0\n{}r{CHAIN} := 1\n", chain(&rule))).await, Ok(()));
    let function = |n: usize| format!("f{n}(1)");
    let called = judged_in_time(&format!("allow if f0(1)\n{}f{CHAIN}(1) := 1\n", chain(&function))).await;
    assert_eq!(called, Ok(()));
    // One rule more is refused, and so is a sum of thousands.
    assert!(problem(&format!("package tng\nallow if r0\n{}", "r0 := 1\n".repeat(128))).contains("128 rules"));
    let sum = vec!["1"; 10_000].join("+\n");
    let found = problem(&format!("package tng\nallow if {sum} == 3\n"));
    assert!(found.contains("nested too deep"), "{found}");
}

/// Rules in a row, with two more as many as a policy may have.
const CHAIN: usize = 126;

#[test]
fn reasons_are_bounded_and_printable() {
    let many: Vec<Value> =
        (0..20).map(|n| Value::from(format!("\u{1b}[31mreason {n:02}\n{}", "x".repeat(500)))).collect();
    let shown = reasons(&Value::from(many)).unwrap();
    assert_eq!(shown.len(), MAX_REASONS + 1);
    assert!(shown.iter().all(|r| r.chars().count() <= MAX_REASON && !r.contains(['\u{1b}', '\n'])), "{shown:?}");
    assert_eq!(shown[MAX_REASONS], "and 12 more");
}
