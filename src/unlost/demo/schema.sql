-- The shop's own tables. They live in the store's database, so that a row, the events and the mark "handled" are one commit.
create table if not exists payment (
    order_id text not null, customer_id text not null, cents integer not null, state text not null
);

create table if not exists settlement (
    day text primary key, cents bigint not null, orders integer not null
);

-- Every settled order, numbered in the sequence in which those of its customer were settled. No order is unique on
-- purpose: one that was settled twice must be seen, not refused.
create table if not exists settled_order (
    order_id text not null, customer_id text not null, day text not null, cents integer not null, number integer not null
);
create index if not exists settled_order_customer on settled_order (customer_id, number);
