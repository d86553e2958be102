//! YAML as kubectl reads it.

use super::*;

fn json(text: &str) -> Json {
    let documents = load(text).unwrap();
    assert_eq!(documents.len(), 1, "{text}");
    documents[0].to_json()
}

#[test]
fn scalars() {
    let check = |text: &str, want: Json| {
        assert_eq!(json(&format!("a: {text}"))["a"], want, "{text}");
    };
    check("x", "x".into());
    check("", Json::Null);
    check("~", Json::Null);
    check("null", Json::Null);
    check("'null'", "null".into());
    check("true", true.into());
    check("yes", true.into());
    check("\"yes\"", "yes".into());
    check("Off", false.into());
    check("y", "y".into());
    check("12", 12.into());
    check("-12", (-12).into());
    check("+12", 12.into());
    check("0x1F", 31.into());
    check("0o17", 15.into());
    check("0644", 420.into());
    check("0899", "0899".into());
    check("-0x1F", (-31).into());
    check("0x-5", "0x-5".into());
    check("-0x-8000000000000000", "-0x-8000000000000000".into());
    check("-0o-1000000000000000000000", "-0o-1000000000000000000000".into());
    check("0", 0.into());
    check("1.5", 1.5.into());
    check("1e3", 1000.0.into());
    check("1.2.3", "1.2.3".into());
    check("10.0.0.1", "10.0.0.1".into());
    check("10.0.0.0/8", "10.0.0.0/8".into());
    check("fd00::1", "fd00::1".into());
    check("12m", "12m".into());
    check(".", ".".into());
    check("99999999999999999999", "99999999999999999999".into());
    check("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z".into());
    check("!!str 12", "12".into());
    check("|\n  two\n  lines\n", "two\nlines\n".into());
}

#[test]
fn documents() {
    let count = |text: &str| load(text).unwrap().len();
    assert_eq!(count(""), 0);
    assert_eq!(count("# only a comment\n"), 0);
    assert_eq!(count("---\n---\n"), 0);
    assert_eq!(count("a: 1\n---\n# nothing\n---\nb: 2\n"), 2);
    assert_eq!(count("\u{feff}a: 1"), 1);
    assert_eq!(count("{\"a\":\t1}"), 1);
    assert_eq!(json("{\"a\": \"\\ud83d\\ude00\"}")["a"], "\u{1f600}");
}

#[test]
fn lines() {
    let documents = load("a:\n  b:\n  - 1\n  - c: 2\n---\nd: 3\n").unwrap();
    let b = documents[0].get("a").unwrap().get("b").unwrap();
    let Value::Sequence(items) = &b.value else { panic!() };
    assert_eq!((items[0].line, items[1].line), (3, 4));
    assert_eq!(documents[1].get("d").unwrap().line, 6);
}

#[test]
fn anchors_and_merges() {
    let text = "base: &base {a: 1, b: 2}\none: *base\ntwo: {<<: *base, b: 3, c: 4}\nthree: {b: 3, <<: [*base]}\n";
    let value = json(text);
    assert_eq!(value["one"], serde_json::json!({"a": 1, "b": 2}));
    assert_eq!(value["two"], serde_json::json!({"a": 1, "b": 3, "c": 4}));
    assert_eq!(value["three"], serde_json::json!({"a": 1, "b": 3}));
    assert!(load("a: {<<: 1}").is_err());
    assert!(load("a: &x [*x]").is_err());
}

#[test]
fn a_key_given_twice_is_an_error() {
    let error = load("a: 1\nb: 2\na: 3\n").unwrap_err();
    assert_eq!(error.line, 3);
    assert_eq!(error.message, "\"a\" is given twice, first on line 1");
    assert!(load("x: &x {a: 1}\ny: {<<: *x, a: 2, a: 3}").is_err());
}

/// Small texts that are large or deep.
#[test]
fn limits() {
    let check = |text: String| assert!(load(&text).is_err(), "{}", &text[..40]);
    check("[".repeat(10_000));
    check(format!("{}{}", "[".repeat(70), "]".repeat(70)));
    check("- ".repeat(10_000));
    check("{a: ".repeat(10_000));
    let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
    for i in 1..9 {
        let previous = format!("*a{},", i - 1).repeat(10);
        bomb += &format!("a{i}: &a{i} [{previous}]\n");
    }
    check(bomb);
    let mut deep = "a0: &a0 [x]\n".to_owned();
    for i in 1..80 {
        deep += &format!("a{i}: &a{i} [*a{}]\n", i - 1);
    }
    check(deep);
}

#[test]
fn syntax_errors_have_a_line() {
    let check = |text: &str, line: u32| {
        let error = load(text).unwrap_err();
        assert_eq!(error.line, line, "{text:?}: {error:?}");
    };
    check("a: 1\nb: [1, 2\nc: 3\n", 3);
    check("a: 1\n b: 2\n", 2);
    check("a: 'x\n", 1);
    check("a: *nothing\n", 1);
    check("? [a]\n: 1\n", 1);
}
