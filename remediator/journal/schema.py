"""The tables of the SQLite journal. What must never happen is forbidden here, by the store.

One index allows one active remediation of a fix and a target; one trigger keeps a terminal phase.
Times are seconds since 1970, targets their canonical key beside their JSON.
"""

APPLICATION_ID = 0x55706B70  # "Upkp", so that no other program's database is taken for ours
VERSION = 1

ACTIVE = "phase IN ('Pending', 'Admitted', 'Running')"

STATEMENTS = (
    """
    CREATE TABLE remediations (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        fix TEXT NOT NULL,
        target TEXT NOT NULL,
        target_json TEXT NOT NULL,
        origin TEXT NOT NULL,
        phase TEXT NOT NULL CHECK (
            phase IN ('Pending', 'Admitted', 'Running', 'Succeeded', 'Failed', 'Skipped')),
        reason TEXT NOT NULL DEFAULT '',
        message TEXT NOT NULL DEFAULT '',
        count INTEGER NOT NULL DEFAULT 1,
        created_at REAL NOT NULL,
        last_seen_at REAL NOT NULL,
        due_at REAL,
        expires_at REAL,
        approved_by TEXT NOT NULL DEFAULT '',
        workload TEXT NOT NULL DEFAULT '',
        condition_json TEXT,
        claim_json TEXT,
        admitted_json TEXT,
        started_at REAL,
        ended_at REAL,
        ended_json TEXT
    ) STRICT
    """,
    f"CREATE UNIQUE INDEX one_active ON remediations (fix, target) WHERE {ACTIVE}",
    "CREATE INDEX by_target ON remediations (fix, target, seq)",
    "CREATE INDEX by_phase ON remediations (fix, phase, seq)",
    "CREATE INDEX by_end ON remediations (fix, phase, ended_at)",
    # A journal that was made before there was this one is read as well, only slower.
    """
    CREATE INDEX by_boot ON remediations (fix, ended_json ->> 'boot_id', ended_json ->> 'boottime')
    WHERE phase IN ('Succeeded', 'Failed') AND started_at IS NOT NULL
    """,
    """
    CREATE TRIGGER terminal_stays BEFORE UPDATE OF phase ON remediations
    WHEN OLD.phase IN ('Succeeded', 'Failed', 'Skipped') AND NEW.phase <> OLD.phase
    BEGIN SELECT RAISE(ABORT, 'a terminal phase never changes'); END
    """,
    """
    CREATE TABLE steps (
        remediation TEXT NOT NULL REFERENCES remediations (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        step_json TEXT NOT NULL,
        PRIMARY KEY (remediation, number)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE alerts (
        remediation INTEGER NOT NULL REFERENCES remediations (seq) ON DELETE CASCADE,
        fingerprint TEXT NOT NULL,
        name TEXT NOT NULL,
        starts_at REAL NOT NULL,
        resolved INTEGER NOT NULL,
        PRIMARY KEY (remediation, fingerprint)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE pauses (
        fix TEXT PRIMARY KEY,
        since REAL NOT NULL,
        by TEXT NOT NULL,
        why TEXT NOT NULL,
        reason TEXT NOT NULL
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE resumed (
        fix TEXT PRIMARY KEY,
        seq INTEGER NOT NULL,
        by TEXT NOT NULL,
        at REAL NOT NULL
    ) STRICT, WITHOUT ROWID
    """,
)
