//! What a policy must not have, found before it runs: functions that call themselves, which would end the process with
//! its stack; functions that are not there, or whose result can be of any size.

use std::collections::{BTreeMap, BTreeSet};

use regorus::Engine;
use regorus::unstable::{BUILTINS, Expr, Import, Literal, Module, Query, Ref, Rule, RuleHead, Span};

use super::{ALLOW, DENY, NAME, Problem};

/// Definitions in a policy. Each may wait for the next one, on the stack.
const MAX_RULES: usize = 128;
/// Expressions within one another, `a + b + c` counting as two.
const MAX_NESTING: usize = 96;

/// Functions of the library that a policy does not get: one number makes their result as large as it says, or they
/// serve the library's own tests.
const WITHHELD: &[&str] = &["numbers.range", "numbers.range_step", "bits.lsh", "trace", "test.sleep"];
/// Not among the library's functions, but called like one. It prints nothing here.
const PRINT: &str = "print";

/// A function that is called, and where.
struct Call<'p> {
    name: String,
    span: &'p Span,
}

/// Checks the one module of `engine`.
pub fn check(engine: &mut Engine) -> Result<(), Problem> {
    let declared = engine.has_declared_rule_rooted_at(NAME, ALLOW);
    let [module] = engine.get_modules().as_slice() else { return Err(Problem::whole("not one policy")) };
    if name(&module.package.refr).as_deref() != Some("tng") {
        return Err(at(&module.package.span, "the package must be tng: write `package tng`"));
    }
    if !declared.unwrap_or(false) {
        return Err(at(&module.package.span, "there is no rule `allow`"));
    }
    if module.policy.len() > MAX_RULES {
        return Err(Problem::whole(format!("more than {MAX_RULES} rules")));
    }
    let aliases = aliases(module);
    let functions: BTreeSet<String> = module.policy.iter().filter_map(|rule| function(rule)).collect();
    let mut called: BTreeMap<String, Vec<Call<'_>>> = BTreeMap::new();
    for rule in &module.policy {
        if let Some(name @ (ALLOW | DENY)) = function(rule).as_deref() {
            return Err(at(rule.span(), format!("`{name}` is asked without arguments, and cannot be a function")));
        }
        let mut walk = Walk { calls: Vec::new(), aliases: &aliases, functions: &functions };
        walk.rule(rule)?;
        for call in &walk.calls {
            known(call, &functions)?;
        }
        if let Some(name) = function(rule) {
            called.entry(name).or_default().append(&mut walk.calls);
        }
    }
    recursion(&called)
}

fn at(span: &Span, message: impl AsRef<str>) -> Problem {
    Problem { at: Some((span.line, span.col)), message: super::printable(message.as_ref(), super::MAX_PROBLEM) }
}

fn known(call: &Call<'_>, functions: &BTreeSet<String>) -> Result<(), Problem> {
    let name = call.name.as_str();
    if functions.contains(name) || name == PRINT {
        return Ok(());
    }
    if WITHHELD.contains(&name) {
        return Err(at(call.span, format!("the function {name} is not for policies: its result has no bound")));
    }
    if BUILTINS.contains_key(name) { Ok(()) } else { Err(at(call.span, format!("there is no function {name}"))) }
}

/// Depth-first over the functions; each is entered once.
fn recursion(called: &BTreeMap<String, Vec<Call<'_>>>) -> Result<(), Problem> {
    fn enter<'c>(
        name: &'c str,
        called: &'c BTreeMap<String, Vec<Call<'_>>>,
        open: &mut Vec<&'c str>,
        done: &mut BTreeSet<&'c str>,
    ) -> Result<(), Problem> {
        open.push(name);
        for call in called.get(name).into_iter().flatten().filter(|call| called.contains_key(&call.name)) {
            if open.contains(&call.name.as_str()) {
                return Err(at(call.span, format!("the function {} calls itself", call.name)));
            }
            if !done.contains(call.name.as_str()) {
                enter(&call.name, called, open, done)?;
            }
        }
        open.pop();
        done.insert(name);
        Ok(())
    }
    let mut done = BTreeSet::new();
    for name in called.keys() {
        if !done.contains(name.as_str()) {
            enter(name, called, &mut Vec::new(), &mut done)?;
        }
    }
    Ok(())
}

/// Name of the function that `rule` defines, if it does.
fn function(rule: &Rule) -> Option<String> {
    match rule {
        Rule::Spec { head: RuleHead::Func { refr, .. }, .. } => name(refr),
        Rule::Default { refr, args, .. } if !args.is_empty() => name(refr),
        _ => None,
    }
}

/// `a.b["c"]` as `a.b.c`, without the package.
fn name(expr: &Ref<Expr>) -> Option<String> {
    let (mut parts, mut next) = (Vec::new(), expr.as_ref());
    loop {
        match next {
            Expr::Var { span, .. } => {
                parts.push(span.text());
                break;
            }
            Expr::RefDot { refr, field, .. } => {
                parts.push(field.0.text());
                next = refr.as_ref();
            }
            Expr::RefBrack { refr, index, .. } => {
                let Expr::String { span, .. } = index.as_ref() else { return None };
                parts.push(span.text());
                next = refr.as_ref();
            }
            _ => return None,
        }
    }
    parts.reverse();
    let path = parts.join(".");
    Some(path.strip_prefix("data.tng.").map(str::to_owned).unwrap_or(path))
}

/// Where `a.b.c` begins; its own span is where its last dot is.
fn start(expr: &Ref<Expr>) -> &Span {
    match expr.as_ref() {
        Expr::RefDot { refr, .. } | Expr::RefBrack { refr, .. } => start(refr),
        other => other.span(),
    }
}

/// Names that imports make, and what they stand for.
fn aliases(module: &Module) -> BTreeMap<String, String> {
    let one = |import: &Import| {
        let path = name(&import.refr)?;
        let last = path.rsplit('.').next().unwrap_or(&path).to_owned();
        Some((import.r#as.as_ref().map_or(last, |alias| alias.text().to_owned()), path))
    };
    module.imports.iter().filter_map(one).collect()
}

/// One rule's calls.
struct Walk<'p, 'a> {
    calls: Vec<Call<'p>>,
    aliases: &'a BTreeMap<String, String>,
    functions: &'a BTreeSet<String>,
}

impl<'p> Walk<'p, '_> {
    fn rule(&mut self, rule: &'p Rule) -> Result<(), Problem> {
        match rule {
            Rule::Default { args, value, .. } => self.all(args.iter().chain([value]), 0),
            Rule::Spec { head, bodies, .. } => {
                match head {
                    RuleHead::Compr { refr, assign, .. } => {
                        self.all([refr].into_iter().chain(assign.as_ref().map(|a| &a.value)), 0)?;
                    }
                    RuleHead::Set { refr, key, .. } => self.all([refr].into_iter().chain(key), 0)?,
                    RuleHead::Func { args, assign, .. } => {
                        self.all(args.iter().chain(assign.as_ref().map(|a| &a.value)), 0)?;
                    }
                }
                for body in bodies {
                    self.all(body.assign.as_ref().map(|a| &a.value), 0)?;
                    self.query(&body.query, 0)?;
                }
                Ok(())
            }
        }
    }

    fn all(&mut self, expressions: impl IntoIterator<Item = &'p Ref<Expr>>, depth: usize) -> Result<(), Problem> {
        expressions.into_iter().try_for_each(|e| self.expression(e.as_ref(), depth))
    }

    fn query(&mut self, query: &'p Query, depth: usize) -> Result<(), Problem> {
        for statement in &query.stmts {
            match &statement.literal {
                Literal::SomeVars { .. } => {}
                Literal::SomeIn { key, value, collection, .. } => {
                    self.all(key.iter().chain([value, collection]), depth)?;
                }
                Literal::Expr { expr, .. } | Literal::NotExpr { expr, .. } => self.expression(expr.as_ref(), depth)?,
                Literal::Every { domain, query, .. } => {
                    self.expression(domain.as_ref(), depth)?;
                    self.deeper(&statement.span, depth)?;
                    self.query(query, depth + 1)?;
                }
            }
            for with in &statement.with_mods {
                self.expression(with.r#as.as_ref(), depth)?;
                // `with f as g`: what calls `f` calls `g`.
                if let Some(name) = name(&with.r#as) {
                    self.called(name, &with.span, true);
                }
            }
        }
        Ok(())
    }

    /// Remembers a call; `maybe` for what is only a function if there is one of that name.
    fn called(&mut self, name: String, span: &'p Span, maybe: bool) {
        let (first, rest) = name.split_once('.').map_or((name.as_str(), None), |(first, rest)| (first, Some(rest)));
        let name = match self.aliases.get(first) {
            Some(path) => rest.map_or_else(|| path.clone(), |rest| format!("{path}.{rest}")),
            None => name,
        };
        if !maybe || self.is_function(&name) {
            self.calls.push(Call { name, span });
        }
    }

    fn is_function(&self, name: &str) -> bool {
        BUILTINS.contains_key(name) || self.functions.contains(name)
    }

    fn deeper(&self, span: &Span, depth: usize) -> Result<(), Problem> {
        if depth < MAX_NESTING { Ok(()) } else { Err(at(span, "expressions are nested too deep")) }
    }

    fn expression(&mut self, expr: &'p Expr, depth: usize) -> Result<(), Problem> {
        self.deeper(expr.span(), depth)?;
        let depth = depth + 1;
        match expr {
            Expr::String { .. }
            | Expr::RawString { .. }
            | Expr::Number { .. }
            | Expr::Bool { .. }
            | Expr::Null { .. }
            | Expr::Var { .. } => Ok(()),
            Expr::Array { items, .. } | Expr::Set { items, .. } => self.all(items, depth),
            Expr::Object { fields, .. } => self.all(fields.iter().flat_map(|(_, key, value)| [key, value]), depth),
            Expr::ArrayCompr { term, query, .. } | Expr::SetCompr { term, query, .. } => {
                self.all([term], depth)?;
                self.query(query, depth)
            }
            Expr::ObjectCompr { key, value, query, .. } => {
                self.all([key, value], depth)?;
                self.query(query, depth)
            }
            Expr::Call { fcn, params, .. } => {
                let span = start(fcn);
                let name = name(fcn).ok_or_else(|| at(span, "a call of something that is no name"))?;
                self.called(name, span, false);
                self.all(params, depth)
            }
            Expr::UnaryExpr { expr, .. } => self.all([expr], depth),
            Expr::RefDot { refr, .. } => self.all([refr], depth),
            Expr::RefBrack { refr, index, .. } => self.all([refr, index], depth),
            Expr::BinExpr { lhs, rhs, .. }
            | Expr::BoolExpr { lhs, rhs, .. }
            | Expr::ArithExpr { lhs, rhs, .. }
            | Expr::AssignExpr { lhs, rhs, .. } => self.all([lhs, rhs], depth),
            Expr::Membership { key, value, collection, .. } => self.all(key.iter().chain([value, collection]), depth),
        }
    }
}
